"""One run in several processes: starting them, what they exchange, and a base that is sharded over
them.
"""
