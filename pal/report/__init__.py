"""Self-contained HTML pages: the report of `pal demo`, and the report on any runs by `pal report`.

`page` defines the elements of a page, `look/` has its template, style and script. `demo`, `training`, `evaluation`,
`cost` and `probe` each turn one kind of run folder into sections; `join` finds the folders and assembles the page.
"""
