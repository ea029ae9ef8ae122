SIZES = {"tiny": {}, "small": {}, "gpu": {}}
