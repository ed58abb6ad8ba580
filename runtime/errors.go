package runtime

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// classed gives an error its class without adding the class's words to its text.
type classed struct {
	error
	class error
}

func (c classed) Unwrap() []error { return []error{c.error, c.class} }

func invalid(format string, a ...any) error {
	return classed{fmt.Errorf(format, a...), errdefs.ErrInvalidArgument}
}

func notFound(format string, a ...any) error {
	return classed{fmt.Errorf(format, a...), errdefs.ErrNotFound}
}

func failed(format string, a ...any) error {
	return classed{fmt.Errorf(format, a...), errdefs.ErrFailedPrecondition}
}

func busy(format string, a ...any) error {
	return classed{fmt.Errorf(format, a...), errdefs.ErrUnavailable}
}
