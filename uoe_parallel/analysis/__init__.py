"""What a run will move, hold and multiply, and what it did: read by programs that plan and profile.

`traffic`, `memory` and `flops` compute; `observe` and `flop_counter` count what a real run does,
and the tests hold the first against the second; `simulate` builds one rank of a world of any size
to ask them about.
"""
