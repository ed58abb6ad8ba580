package filter

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// fields is an object whose fields are the keys, joined by dots.
type fields map[string]string

func (f fields) Field(path []string) (string, bool) {
	v, ok := f[strings.Join(path, ".")]
	return v, ok
}

func TestMatch(t *testing.T) {
	redis := fields{"name": "docker.io/library/redis:latest", "labels.a": "b", "labels.x.y/z": "w v"}
	for _, c := range []struct {
		filters []string
		want    bool
	}{
		{nil, true},
		{[]string{"name"}, true},
		{[]string{"labels.b"}, false},
		{[]string{"name==docker.io/library/redis:latest"}, true},
		{[]string{"name!=docker.io/library/redis:latest"}, false},
		{[]string{"name~=redis"}, true},
		{[]string{`labels."x.y/z"=="w v"`}, true},
		{[]string{"labels.a==b,name~=alpine"}, false},
		{[]string{"labels.a==b,name~=redis"}, true},
		{[]string{"name~=alpine", "labels.a==b"}, true},
		{[]string{"name~=alpine", "labels.a==c"}, false},
	} {
		f, err := Parse(c.filters)
		if err != nil {
			t.Fatalf("%q: %v", c.filters, err)
		}
		if got, err := f.Match(redis); got != c.want || err != nil {
			t.Errorf("%q: %v, %v", c.filters, got, err)
		}
		if f.All() != (c.filters == nil) {
			t.Errorf("%q: All is %v", c.filters, f.All())
		}
	}
}

func TestWhatIsNoFilter(t *testing.T) {
	for _, bad := range []string{"name=", "==x", "name~=", "name==x,", `name=="x`, ""} {
		if _, err := Parse([]string{bad}); bad != "" && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	f, err := Parse([]string{`name~="("`})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Match(fields{"name": "x"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a malformed regular expression: %v", err)
	}
}
