package inflate

import "sync"

type fixedCodes struct {
	lit  [litSize]uint32
	dist [distSize]uint32
}

// fixed are the codes of RFC 1951, 3.2.6.
var fixed = sync.OnceValue(func() *fixedCodes {
	var lengths [288]uint8
	for i := range lengths {
		switch {
		case i < 144:
			lengths[i] = 8
		case i < 256:
			lengths[i] = 9
		case i < 280:
			lengths[i] = 7
		default:
			lengths[i] = 8
		}
	}
	f := new(fixedCodes)
	build(f.lit[:], litBits, lengths[:], litEntry[:])
	for i := range 32 {
		lengths[i] = 5
	}
	build(f.dist[:], distBits, lengths[:32], distEntry[:])
	return f
})
