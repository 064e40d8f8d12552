"""What a run costs before anything is rented: the real train step, compiled for machines that are not here."""
