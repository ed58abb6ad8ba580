package layout

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"distkit/disk"

	"github.com/containerd/errdefs"
)

// change writes an index.json, changes it, and returns the new text.
func change(t *testing.T, text string, f func(*Index) error) (string, error) {
	t.Helper()
	d := Dir{Tree: disk.Tree(t.TempDir()), Name: "."}
	path := filepath.Join(string(d.Tree), "index.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cerr := d.Change(context.Background(), func() error { return nil }, f)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.parse(b); err != nil && cerr == nil {
		t.Errorf("what was written: %v", err)
	}
	return string(b), cerr
}

func named(name string) string {
	return `{ "annotations":{"org.opencontainers.image.ref.name":"` + name + `"}, "digest":"d"}`
}

// Entries that are not changed stay the same, byte for byte, when others are removed, changed or added.
func TestChangeKeepsOtherEntries(t *testing.T) {
	a, b, c := named("a"), named("b"), named("c")
	text := "\n{ \"x\" : [1.50,\"]\"],\"manifests\":[ " + a + " ,\n\t" + b + "," + c + "] ,\"schemaVersion\":2}"
	added := Entry{Raw: json.RawMessage(`{"new":1}`)}
	remove := func(gone ...string) func(*Index) error {
		return func(ix *Index) error {
			ix.Entries = slices.DeleteFunc(ix.Entries, func(e Entry) bool { return slices.Contains(gone, e.Name) })
			return nil
		}
	}
	for manifests, f := range map[string]func(*Index) error{
		a + " ,\n\t" + b + "," + c: func(*Index) error { return nil },
		a + " ,\n\t" + b:           remove("c"),
		a + "," + c:                remove("b"),
		b + "," + c:                remove("a"),
		b:                          remove("a", "c"),
		"":                         remove("a", "b", "c"),
		a + " ,\n\t" + b + "," + c + `,{"new":1}`: func(ix *Index) error {
			ix.Entries = append(ix.Entries, added)
			return nil
		},
		a + `,{"new":1},` + c: func(ix *Index) error {
			ix.Entries[ix.Find("b")] = added
			return nil
		},
		c + "," + b + "," + b + "," + a: func(ix *Index) error {
			slices.Reverse(ix.Entries)
			ix.Entries = slices.Insert(ix.Entries, 1, ix.Entries[1])
			return nil
		},
	} {
		want := `{"manifests":[` + manifests + `],"schemaVersion":2,"x":[1.50,"]"]}` + "\n"
		if got, err := change(t, text, f); err != nil || got != want {
			t.Errorf("index.json is %s\nnot %s\n%v", got, want, err)
		}
	}
}

func TestNamesOfEntries(t *testing.T) {
	const ref = `"org.opencontainers.image.ref.name"`
	text := `{"manifests":null,"manifests":[` + strings.Join([]string{
		`{"annotations":{` + ref + `:"\u0061\/b\"<"}}`,
		`{"annotations":{"x":1,"org.opencontainers.image.ref.nam\u0065":"escaped"}}`,
		`{"annotations":{` + ref + `:"first",` + ref + `:"last"},"annotations":null}`,
		`{"annotations":[{` + ref + `:"x"}],"digest":{` + ref + `:"x","annotations":{` + ref + `:"y"}}}`,
		`{"annotations":{` + ref + `:null}}`, `{"annotations":{` + ref + `:1}}`, `{}`, `1`, `["annotations"]`,
	}, ",") + `]}`
	want := []string{`a/b"<`, "escaped", "last", "", "", "", "", "", ""}
	_, err := change(t, text, func(ix *Index) error {
		for i, e := range ix.Entries {
			if _, err := e.Descriptor(); e.Name != want[i] || e.Malformed && err == nil || e.Malformed != (i == 5 || i > 6) {
				t.Errorf("entry %s: name %q, strange %t, %v", e.Raw, e.Name, e.Malformed, err)
			}
		}
		if len(ix.Entries) != len(want) || ix.Find("escaped") != 1 || ix.Find("") >= 0 || ix.Find("x") >= 0 {
			t.Errorf("%d entries", len(ix.Entries))
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// A file that is not an index is not overwritten, and no index is written that others could not read.
func TestChangeRefuses(t *testing.T) {
	many := `{"manifests":[` + strings.Repeat("1,", maxEntries-1) + `1]}`
	for text, says := range map[string]string{
		"": "", " ": "", "{": "", "[]": "not an object", `{"manifests":{}}`: "not an array", `{"manifests":[]} x`: "", `{"manifests":[1,]}`: "",
		`{"a":1,"manifests":[{"annotations":{"x":1}]}`: "", `{"manifests":[{"annotations":{"x"}}]}`: "",
		many[:len(many)-2] + ",1]}": "more than 1048576 manifests", many: "too many names",
	} {
		got, err := change(t, text, func(ix *Index) error {
			ix.Entries = append(ix.Entries, Entry{Raw: json.RawMessage("{}")})
			return nil
		})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), says) || got != text {
			t.Errorf("%.40q: %v; now %.40q", text, err, got)
		}
	}
}
