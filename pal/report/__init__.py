"""Pages of HTML that stand alone: the demo's, and the one that `pal report` joins from any runs.

`page` says what a page is made of, `look/` how it looks. `demo`, `training`, `evaluation`, `cost` and `probe` each turn
one kind of folder into sections; `join` finds the folders and puts the sections together.
"""
