"""Every combination of the grid."""

from pipeline.stages.searches import Search, combinations

SEARCH = Search(lambda settings, _tried: combinations(settings), lambda _settings: False)
