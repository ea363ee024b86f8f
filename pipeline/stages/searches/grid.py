"""Every combination of the grid."""

from pipeline.stages.searches import Search, combinations

SEARCH = Search("trains every combination", lambda settings, _tried: combinations(settings), lambda _settings: False)
