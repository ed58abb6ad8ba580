package remotes

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestNextLink(t *testing.T) {
	const next = "/v2/x/tags/list?c=1"
	for _, header := range [][]string{
		{`<%s>; rel="next"`}, {`<%s>; rel=next`}, {`<%s>;rel=next`}, {`<%s>; REL="NEXT"`}, {`<%s>; rel="Next"`},
		{`<%s> ; rel = "next"`}, {"<%s>\t;\trel\t=\t\"next\""}, {`<%s>; rel="n\ext"`}, {`<%s>; rel="last next"`}, {`<%s>; rel="next";`},
		{`<%s>; title="a, <b>; rel=\"last\""; rel="next"`}, {`<%s>; rel="next"; rel="last"`},
		{`</v2/x/tags/list?first=1>; rel="first", <%s>; rel="next"`}, {`<%s>; rel="next", </v2/x/tags/list?c=9>; rel="last"`},
		{`</v2/x/tags/list?a,b>; rel=first,<%s>;rel=next`}, {`</v2/x/tags/list?first=1>; rel="first"`, `<%s>; rel="next"`},
		{``, `, <%s>; rel="next",`}, {`</other>; rel=next; anchor="#x", <%s>; rel=next`},
	} {
		for i := range header {
			header[i] = strings.ReplaceAll(header[i], "%s", next)
		}
		if got, ok, err := nextLink(header); got != next || !ok || err != nil {
			t.Errorf("%q: %q, %v, %v", header, got, ok, err)
		}
	}
	for _, header := range []string{``, `<x>; rel="prev"`, `<x>; rel="prev"; rel="next"`, `<x>`, `<x>; relx="next"`, `<x>; title="rel=next"`, `<x>; rel="nextpage"`, `<x>; rel`} {
		if got, ok, err := nextLink([]string{header}); ok || err != nil {
			t.Errorf("%q: %q, %v, %v", header, got, ok, err)
		}
	}
	for _, header := range []string{`/v2/x; rel="next"`, `<x; rel="next"`, `<x>; rel="next`, `<x>; rel="next\`, `<x> rel="next"`, `<x>; rel="next" <y>; rel="last"`, `<x>; rel="next", <y>; rel="next"`} {
		_, _, err := nextLink([]string{header})
		is(t, err, errdefs.IsDataLoss)
	}
}

// A list is complete, or there is an error.
func TestTagsOfOddLinks(t *testing.T) {
	for link, whole := range map[string]bool{
		`<%s>; rel="next"`: true, `<%s>; REL="NEXT"`: true, `<%s> ; rel = "next"`: true,
		`</v2/x/tags/list?first=1>; rel="first", <%s>; rel="next"`: true, `<%s; rel="next"`: false,
	} {
		f := newFake(t)
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.URL.Query().Get("c") == "" {
				w.Header().Set("Link", strings.ReplaceAll(link, "%s", "/v2/x/tags/list?c=1"))
			}
			fmt.Fprintf(w, `{"tags":["t%d"]}`, n)
			return true
		})
		var got []string
		var failed error
		for tag, err := range open(t, f.host(), Options{}).Tags(context.Background()) {
			failed = errors.Join(failed, err)
			got = append(got, tag)
		}
		if whole && (failed != nil || strings.Join(got, " ") != "t1 t2") {
			t.Errorf("%s: %q, %v", link, got, failed)
		} else if !whole {
			is(t, failed, errdefs.IsDataLoss)
		}
	}
}

func FuzzNextLink(f *testing.F) {
	f.Add(`</x>; rel="next", <y>;a="\"`)
	f.Fuzz(func(t *testing.T, header string) {
		target, ok, err := nextLink([]string{header})
		if ok && (err != nil || !strings.Contains(header, "<"+target+">")) {
			t.Errorf("%q: %q, %v", header, target, err)
		}
	})
}
