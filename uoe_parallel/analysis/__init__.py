"""What a run will move and hold, and what it did: read by programs that plan and profile.

`traffic` and `memory` compute; `observe` counts what a real run does, and the tests hold the
first against the second; `simulate` builds one rank of a world of any size to ask them about.
"""
