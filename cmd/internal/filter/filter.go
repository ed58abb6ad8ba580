// Package filter selects objects by expressions in containerd's filter syntax.
package filter

import (
	"io"
	"strings"

	"distkit/cmd/internal/cli"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/log"
)

// Object returns the value of a field, and whether the object has it. The paths "labels.a" and labels."a.b" have two
// elements each.
type Object interface {
	Field(fieldpath []string) (value string, present bool)
}

// Filter selects the objects that match any of its expressions. Without expressions it selects all.
type Filter struct {
	any  filters.Filter
	logs *logs
}

// Parse parses expressions as ctr takes them, such as name==x or labels.a~=^b. A malformed one is wrong usage.
func Parse(expressions []string) (Filter, error) {
	if len(expressions) == 0 {
		return Filter{any: filters.Always}, nil
	}
	f, err := filters.ParseAll(expressions...)
	if err != nil {
		return Filter{}, cli.Usagef("filter %q: %w", strings.Join(expressions, `" "`), err)
	}
	// The package reports a malformed regular expression only to its log, when it first uses it.
	l := &logs{}
	log.L.Logger.SetOutput(io.Discard)
	log.L.Logger.AddHook(l)
	return Filter{f, l}, nil
}

// Match reports whether the filter selects the object. If it needed a malformed regular expression, that is wrong
// usage.
func (f Filter) Match(o Object) (bool, error) {
	ok := f.any.Match(o)
	if f.logs != nil && f.logs.first != "" {
		return false, cli.Usagef("filter: %s", f.logs.first)
	}
	return ok, nil
}

// All reports whether the filter has no expressions, so that objects need not be examined.
func (f Filter) All() bool { return f.logs == nil }

type logs struct{ first string }

func (l *logs) Levels() []log.Level { return []log.Level{log.ErrorLevel} }

func (l *logs) Fire(e *log.Entry) error {
	if l.first == "" {
		l.first = e.Message
	}
	return nil
}
