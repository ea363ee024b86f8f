"""The terminal UI: eight screens on one project. torch is never imported here."""

import os

# Must be set before Textual is imported. At the default of 60 frames per second, an answer waits up
# to 17 ms for the next frame. Textual draws a frame only when something changed, so an idle screen
# costs nothing more.
os.environ.setdefault("TEXTUAL_FPS", "120")
