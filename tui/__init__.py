"""The terminal UI: four screens on one project. torch is never imported here."""
