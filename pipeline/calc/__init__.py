"""The calculator: parameters, memory and fit from shapes alone. Needs the standard library and
PyYAML, not torch.
"""
