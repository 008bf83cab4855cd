"""What a fitted model learned: identifiability on planted truth, programs, and probes of its representation."""
