"""The terminal UI: four screens on one project. torch is never imported here."""

import os

# Textual reads it when it is imported. At its 60 frames a second an answer that is ready waits up to 17 ms for the
# next frame. Frames are drawn only when something changed, so that an idle screen costs nothing more.
os.environ.setdefault("TEXTUAL_FPS", "120")
