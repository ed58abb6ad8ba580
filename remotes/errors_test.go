package remotes

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// A registry's warnings are printed once, each on one line of bounded length, whatever the registry sends.
func TestWarnings(t *testing.T) {
	for lines, want := range map[string][]string{
		`299 - "this tag ends soon"`:            {"warns: this tag ends soon"},
		"299 - \"a\"\n299 - \"a\"\n299 - \"b\"": {"warns: a", "warns: b"},
		`299 - "say \"no\""`:                    {`warns: say "no"`},
		`299 - "tab	and é"`:                     {"warns: tab and é"},
		`299 - ""`:                              nil,
		`299 - "no end`:                         nil,
		`299 - bare`:                            nil,
		`199 - "not ours"`:                      nil,
		`299 other "not ours"`:                  nil,
		``:                                      nil,
		`299 - "` + strings.Repeat("x", 100_000) + `"`:                                 {"warns: " + strings.Repeat("x", maxErrorText) + "…"},
		"299 - \"1\"\n299 - \"2\"\n299 - \"3\"\n299 - \"4\"\n299 - \"5\"\n299 - \"6\"": {"warns: 1", "warns: 2", "warns: 3", "warns: 4", "warns: 5"},
	} {
		for _, status := range []int{0, 404} {
			f := newFake(t)
			f.manifest("latest", "application/vnd.oci.image.manifest.v1+json", []byte(tinyManifest))
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				for _, line := range strings.Split(lines, "\n") {
					w.Header().Add([]string{"Warning", "wARNING"}[n%2], line)
				}
				if status != 0 {
					w.WriteHeader(status)
				}
				return status != 0
			})
			var told []string
			r := open(t, f.host(), Options{Notify: func(s string) { told = append(told, strings.TrimPrefix(s, f.host()+" ")) }})
			for range 3 {
				_, err := r.Resolve(context.Background(), "latest")
				if (err == nil) != (status == 0) {
					t.Error(err)
				}
			}
			if !slices.Equal(told, want) {
				t.Errorf("%.60q: told %.400q", lines, told)
			}
		}
	}
	// A warning from another origin is not the registry's.
	storage := newFake(t)
	id := storage.blob([]byte("x"))
	storage.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Warning", `299 - "buy more"`)
		return false
	})
	f := newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		http.Redirect(w, r, storage.URL+r.URL.Path, http.StatusTemporaryRedirect)
		return true
	})
	body, err := open(t, f.host(), Options{Notify: func(s string) { t.Errorf("told %q", s) }}).Fetch(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if _, err := io.ReadAll(body); err != nil {
		t.Error(err)
	}
}

// The details of an error are part of the line that is printed for it.
func TestErrorDetail(t *testing.T) {
	for body, want := range map[string]string{
		`{"errors":[{"code":"DENIED","message":"no","detail":"over quota"}]}`:              "403 Forbidden: DENIED: no: over quota",
		`{"errors":[{"code":"DENIED","message":"no","detail":{"used":5}}]}`:                `403 Forbidden: DENIED: no: {"used":5}`,
		`{"errors":[{"code":"DENIED","message":"no","detail":{}}]}`:                        "403 Forbidden: DENIED: no",
		`{"errors":[{"code":"DENIED","message":"no","detail":null}]}`:                      "403 Forbidden: DENIED: no",
		`{"errors":[{"code":"DENIED","message":"no","detail":[]}]}`:                        "403 Forbidden: DENIED: no",
		`{"errors":[{"code":"DENIED","detail":7},{"message":"b"}]}`:                        "403 Forbidden: DENIED: 7; b",
		`{"errors":[{"code":"DENIED","message":"no","detail":"a\nb\u001b[31m"}]}`:          "403 Forbidden: DENIED: no: a b?[31m",
		`{"errors":[{"code":"A","detail":"` + strings.Repeat("x", 1000) + `"}]}`:           "403 Forbidden: A: " + strings.Repeat("x", maxErrorText-3) + "…",
		`{"errors":[{"code":"A","detail":"` + strings.Repeat("x", 2*maxErrorBody) + `"}]}`: "403 Forbidden", // only a part is read
	} {
		f := newFake(t)
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, body)
			return true
		})
		_, err := open(t, f.host(), Options{}).Fetch(context.Background(), "latest")
		if err == nil || !strings.HasSuffix(err.Error(), ":latest: "+want) {
			t.Errorf("%.80s: %v", body, err)
		}
	}
}
