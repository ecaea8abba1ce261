"""Commands beside serving: compile, update the catalogue, push, plan, diagnose.

arrivals.py       pauses between a user's requests, fitted to a log
capacity.py       plans memory, hit rate and machines
compile.py        builds, checks and installs the engines of a bundle
compile_ahead.py  engines built without a GPU, in a new bundle
compile_plan.py   the profiles, memory and keys of a compilation
diagnosis.py      the report of the doctor
doctor.py         the devices that work on a machine, and why others do not
engines.py        the engines of a bundle, and why each is usable or not
item_input.py     items that arrive after export, and their vectors
push.py           pushes a bundle to the Hugging Face Hub
update_bundle.py  a bundle with more or fewer items
"""
