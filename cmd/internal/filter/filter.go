// Package filter selects objects by expressions in containerd's filter syntax.
package filter

import (
	"io"
	"strings"

	"distkit/cmd/internal/cli"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/log"
)

// Object gives the value of a field, and whether it has one; the path "labels.a" is two
// elements, and so is labels."a.b".
type Object interface {
	Field(fieldpath []string) (value string, present bool)
}

// Filter selects the objects that any of its expressions matches; without any, all.
type Filter struct {
	any  filters.Filter
	logs *logs
}

// Parse reads expressions as ctr takes them, such as name==x or labels.a~=^b. One that can't be
// read is wrong usage.
func Parse(expressions []string) (Filter, error) {
	if len(expressions) == 0 {
		return Filter{any: filters.Always}, nil
	}
	f, err := filters.ParseAll(expressions...)
	if err != nil {
		return Filter{}, cli.Usagef("filter %q: %w", strings.Join(expressions, `" "`), err)
	}
	// Of a malformed regular expression the package tells its log, when it first needs it.
	l := &logs{}
	log.L.Logger.SetOutput(io.Discard)
	log.L.Logger.AddHook(l)
	return Filter{f, l}, nil
}

// Match tells whether the filter selects the object. A malformed regular expression that was
// needed for that is wrong usage.
func (f Filter) Match(o Object) (bool, error) {
	ok := f.any.Match(o)
	if f.logs != nil && f.logs.first != "" {
		return false, cli.Usagef("filter: %s", f.logs.first)
	}
	return ok, nil
}

// All tells whether the filter has no expressions, so that objects need not be looked at.
func (f Filter) All() bool { return f.logs == nil }

type logs struct{ first string }

func (l *logs) Levels() []log.Level { return []log.Level{log.ErrorLevel} }

func (l *logs) Fire(e *log.Entry) error {
	if l.first == "" {
		l.first = e.Message
	}
	return nil
}
