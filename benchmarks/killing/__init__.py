"""Random kills of real runs: what is killed (`groups`), where (`triggers`), in which process (`forking`), and what is
expected of it afterwards (`cases`)."""
