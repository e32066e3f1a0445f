"""``gatdist bench scaling``: what a worker more brings, and how soon a lost one is made good."""
