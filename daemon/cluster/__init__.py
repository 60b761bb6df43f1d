"""Several machines, one model: who is there, what each of them computes, and what happens when one is lost."""
