"""What is measured: operators at the shapes of real models, with their peers and their bounds."""
