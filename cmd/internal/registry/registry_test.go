package registry

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"distkit/remotes"

	"github.com/containerd/errdefs"
)

const someDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func directory(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// What stands behind a REF may be a hint, but not a second object: it would be ignored, and the wrong object moved.
func TestObject(t *testing.T) {
	t.Parallel()
	dir := directory(t)
	for args, want := range map[string]string{
		"h.example/x a":                             "h.example/x a",
		"h.example/x a size:1":                      "h.example/x a size:1",
		"h.example/x " + someDigest + " -":          "h.example/x " + someDigest + " -",
		"h.example/x:a":                             "h.example/x a",
		"h.example/x:a size:1":                      "h.example/x a size:1",
		"h.example/x:a mediatype:application/x -":   "h.example/x a mediatype:application/x -",
		"h.example/x:a range:0-1":                   "h.example/x a range:0-1",
		"h.example/x:a offset:1":                    "h.example/x a offset:1",
		dir + ":h.example/x:a":                      dir + " h.example/x:a",
		"foo::h/x:1":                                "foo::h/x 1",
		"h.example/x":                               "",
		"h.example/x:a b":                           "",
		"h.example/x:a " + someDigest:               "",
		"h.example/x@" + someDigest + " a":          "",
		"h.example/x:a sha256:cut":                  "",
		"h.example/x:a h.example/x:b":               "",
		dir + ":h.example/x:a " + someDigest:        "",
		dir + ":h.example/x:a h.example/x:b size:1": "",
	} {
		locator, object, hints, err := Object(strings.Fields(args))
		if want == "" {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s: %v", args, err)
			}
		} else if got := strings.Join(append([]string{locator, object}, hints...), " "); got != want || err != nil {
			t.Errorf("%s: %s, %v", args, got, err)
		}
	}
}

// An operand that is alone and has a tag names something, whatever remote it is of: as a LOCATOR without objects, it would be a success that
// does nothing.
func TestObjects(t *testing.T) {
	t.Parallel()
	dir := directory(t)
	odd := dir + ":latest"
	if err := os.Mkdir(odd, 0o755); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"h.example/x":                 "",
		"localhost:5000/x":            "",
		"foo::h/x":                    "",
		dir:                           "",
		odd:                           "",
		"./none":                      "",
		"h.example/x a b":             "a b",
		dir + " a h.example/x:b":      "a h.example/x:b",
		"h.example/x:a":               "a",
		"h.example/x:a h.example/y:b": "a b",
		"h.example/x:a foo::h/x:1":    "a 1",
		"h.example/x@" + someDigest:   someDigest,
		dir + ":h.example/x:a":        "h.example/x:a",
		"./none:a":                    "a",
		"foo::h/x:1":                  "1",
		"foo::h/x@" + someDigest:      someDigest,
		"h.example/x:a b":             "a usage",
	} {
		list, open, err := NewRemotes(&remotes.Options{}).Objects(strings.Fields(args))
		if err != nil {
			t.Errorf("%s: %v", args, err)
			continue
		}
		var got []string
		for _, s := range list {
			_, object, err := open(s)
			if errdefs.IsInvalidArgument(err) {
				object = "usage"
			} else if err != nil {
				t.Errorf("%s: %v", args, err)
			}
			got = append(got, object)
		}
		if !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%s: %q", args, got)
		}
	}
}
