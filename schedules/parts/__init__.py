"""What schedules share: phases of a run and shapes of a decay."""
