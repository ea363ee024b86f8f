"""`python -m docs`: renews the pages that are generated from the code. A test compares them with
what this writes.
"""

import os

os.environ["LORA_NO_EXTENSIONS"] = "1"  # the pages are of the program alone

from docs.generators import generated

for path, text in generated().items():
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
