"""What else than flags is shown: things, which an edit of a flag must leave alone."""

from __future__ import annotations

THINGS: dict[str, str] = dict(
    pair.split(" ", 1)[::-1]
    for pair in """
🐶 dog|🐱 cat|🐭 mouse|🐰 rabbit|🦊 fox|🐻 bear|🐼 panda|🐯 tiger|🦁 lion|🐮 cow|🐷 pig
🐸 frog|🐵 monkey|🐔 chicken|🐧 penguin|🦆 duck|🦅 eagle|🦉 owl|🐺 wolf|🐴 horse|🐝 bee
🐌 snail|🐞 ladybug|🐢 turtle|🐍 snake|🐙 octopus|🐬 dolphin|🦈 shark|🐘 elephant|🍎 apple
🍌 banana|🍇 grapes|🍓 strawberry|🍒 cherries|🍍 pineapple|🥕 carrot|🌽 corn|🍞 bread
🧀 cheese|🍕 pizza|🍩 doughnut|🎂 cake|🚗 car|🚌 bus|🚲 bicycle|🚂 train|🚀 rocket|⛵ boat
🚁 helicopter|🎸 guitar|🎹 piano|🥁 drum|🎈 balloon|📷 camera|📖 book|🔑 key|🔨 hammer
⏰ clock|🌵 cactus|🌻 sunflower|🍄 mushroom|🌙 moon|👑 crown|🎩 hat|⚽ football|🏠 house
""".strip().replace("\n", "|").split("|")
)  # fmt: skip
"""Name -> emoji."""
