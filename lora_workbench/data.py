"""Data files: read, checked, cleaned and converted, as `lora data` does.

A file is a `Path` here. A tokenizer is that of a loaded model: `load(base=folder).tokenizer`.
"""

from pipeline.data.check import DataReport, check
from pipeline.data.convert import Conversion, convert
from pipeline.data.examples import Example
from pipeline.data.formats import iter_examples as read
from pipeline.data.quality.clean import Cleaned, clean

__all__ = ["Cleaned", "Conversion", "DataReport", "Example", "check", "clean", "convert", "read"]
