"""The fixture `on_gpu`, as any project takes it."""

pytest_plugins = ["ptxsim.plugin"]
