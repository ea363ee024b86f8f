"""The calculator: parameters, memory and what fits, from shapes alone. Standard library and PyYAML, no torch."""
