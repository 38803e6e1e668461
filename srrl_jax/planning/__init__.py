"""What a recipe needs on machines that are not there: does it fit, and how long will a step take?"""
