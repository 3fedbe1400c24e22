"""Published checkpoints in the formats of their own projects, and their conversion to folders of diffusers."""
