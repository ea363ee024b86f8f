"""Work on other devices and machines: units that engines run, and the exchange of their results.

A unit is a `lora` command line with a folder of its own and the shared cache. An engine that exists
(this machine, Slurm, Ray) runs units. What they make is in the cache, where the ordinary stage
finds it. The truth about a unit is its files, and then its engine's queue: there is no daemon.
"""
