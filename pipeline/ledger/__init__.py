"""The ledger: what the document claims, how each claim is measured, and the verdict that follows."""
