package snapshot

// OnStep makes f be called between the steps of every change, with the step's name.
func OnStep(f func(string)) { step = f }
