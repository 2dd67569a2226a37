"""The parts of the page, each a function of the study: what it shows, what that was made from, or what is missing."""
