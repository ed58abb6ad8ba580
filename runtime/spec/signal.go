package spec

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// StopSignal returns the signal that stops a container with these annotations: the image's, or TERM.
func StopSignal(annotations map[string]string) unix.Signal {
	if sig, err := ParseSignal(annotations[stopSignalAnnotation]); err == nil {
		return sig
	}
	return unix.SIGTERM
}

// ParseSignal parses a signal as kill(1) does: TERM, SIGTERM, 15, RTMIN+1.
func ParseSignal(s string) (unix.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n <= 64 {
		return unix.Signal(n), nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if sig := unix.SignalNum("SIG" + name); sig != 0 {
		return sig, nil
	}
	base := 0
	rest, ok := strings.CutPrefix(name, "RTMIN")
	if base = 34; !ok {
		if rest, ok = strings.CutPrefix(name, "RTMAX"); ok {
			base = 64
		}
	}
	n := 0
	if ok && rest != "" {
		var err error
		if n, err = strconv.Atoi(rest); err != nil || rest[0] != '+' && rest[0] != '-' {
			ok = false
		}
	}
	if n += base; !ok || n < 34 || n > 64 {
		return 0, invalid("%q is no signal: a name such as TERM, or a number", s)
	}
	return unix.Signal(n), nil
}
