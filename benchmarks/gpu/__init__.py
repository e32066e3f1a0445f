"""The first hour on a GPU: is the step correct, how fast is it, what does it spend its time on."""
