// Package errclass gives an error one of the classes of github.com/containerd/errdefs, from
// which exit statuses follow, without adding the class's words to its text.
package errclass

import "fmt"

// As returns err with these classes: errors.Is finds them, and all that err wraps.
func As(err error, classes ...error) error { return classed{err, classes} }

// Errorf is As of fmt.Errorf.
func Errorf(class error, format string, a ...any) error { return As(fmt.Errorf(format, a...), class) }

type classed struct {
	error
	classes []error
}

func (c classed) Unwrap() []error { return append([]error{c.error}, c.classes...) }
