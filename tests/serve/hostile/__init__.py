"""What strangers may send to a server of OpenAI's protocol, and what it makes of it: `python -m tests.serve.hostile URL`.

The tests of this folder send the same to a server of their own, in smaller numbers (`tests/counts.py`).
"""
