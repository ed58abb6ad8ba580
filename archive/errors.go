package archive

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// classed gives an error a class without adding the class's words to its text.
type classed struct {
	error
	class error
}

func (c classed) Unwrap() []error { return []error{c.error, c.class} }

func dataLoss(format string, a ...any) error {
	return classed{fmt.Errorf(format, a...), errdefs.ErrDataLoss}
}

func refused(format string, a ...any) error {
	return classed{fmt.Errorf(format, a...), errdefs.ErrInvalidArgument}
}

// quote shows a name in an error, cut to a length that can be read.
func quote(name string) string {
	const most = 200
	if len(name) > most {
		return fmt.Sprintf("%q…", name[:most])
	}
	return fmt.Sprintf("%q", name)
}
