"""Workers of a group reach each other: introduced by their head, for as long as the group lives."""
