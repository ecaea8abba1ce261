"""Commands beside serving: compile, update the catalogue, plan, diagnose.

arrivals.py       when users come back, fitted to a log
capacity.py       memory, hit rate and machines planned
compile.py        profiles, build, layer check, golden requests, installation
compile_ahead.py  engines built without a GPU, in a new bundle
compile_plan.py   what a compilation would do: profiles, memory, keys
diagnosis.py      what the doctor reports
doctor.py         what a machine can serve on, and why not on more
engines.py        the engines of a bundle, and what is wrong with them
new_items.py      items that arrive after export, and their vectors
update_bundle.py  a bundle with more or fewer items
"""
