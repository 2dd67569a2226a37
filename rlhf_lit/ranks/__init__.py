"""What several processes need to run as one: a watch over each other, a check that they carry out the same run, and an
agreement on the step to stop after."""
