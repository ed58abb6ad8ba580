package remotes

import (
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParseLocator(t *testing.T) {
	for s, want := range map[string]Locator{
		"docker.io/library/redis":  {Host: "docker.io", Name: "library/redis"},
		"docker.io/redis":          {Host: "docker.io", Name: "library/redis"},
		"index.docker.io/redis":    {Host: "docker.io", Name: "library/redis"},
		"docker.io/bitnami/redis":  {Host: "docker.io", Name: "bitnami/redis"},
		"registry-1.docker.io/a/b": {Host: "registry-1.docker.io", Name: "a/b"},
		"localhost:5000/x":         {Host: "localhost:5000", Name: "x"},
		"localhost/x":              {Host: "localhost", Name: "x"},
		"127.0.0.1:5000/a/b":       {Host: "127.0.0.1:5000", Name: "a/b"},
		"[::1]:5000/x":             {Host: "[::1]:5000", Name: "x"},
		"[::1]/x":                  {Host: "[::1]", Name: "x"},
		"host:1/a-b/c.d/e_f/g__h":  {Host: "host:1", Name: "a-b/c.d/e_f/g__h"},
		"ghcr.io/a/b":              {Host: "ghcr.io", Name: "a/b"},
		"./x":                      {Path: "./x"},
		"../x:y":                   {Path: "../x:y"},
		"/x/y":                     {Path: "/x/y"},
		".":                        {Path: "."},
		"..":                       {Path: ".."},
	} {
		got, err := ParseLocator(s)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for s, say := range map[string]string{
		"":                        "docker.io/library/redis",
		"redis":                   "docker.io/library/redis",
		"library/redis":           "docker.io/library/redis",
		"redis:latest":            "no repository",
		"localhost":               "localhost/NAME",
		"localhost:5000":          "localhost:5000/NAME",
		"localhost:5000/":         "localhost:5000/NAME",
		"docker.io/":              "docker.io/NAME",
		"https://docker.io/redis": "write docker.io/redis",
		"docker.io/redis:7":       "write docker.io/library/redis 7",
		"docker.io/redis@sha256:" + strings.Repeat("a", 64): "write docker.io/library/redis sha256:a",
		"docker.io/Redis":                       "lowercase",
		"docker.io/a//b":                        "invalid",
		"docker.io/a b":                         "invalid",
		"docker.io/../x":                        "invalid",
		"ho st.x/a":                             "invalid",
		"a_b.c/d":                               "invalid",
		"a.b/\x00":                              "NUL",
		"docker.io/a?b=c":                       "invalid",
		"docker.io/a/%2e%2e":                    "invalid",
		"docker.io/" + strings.Repeat("a", 300): "255",
	} {
		_, err := ParseLocator(s)
		is(t, err, errdefs.IsInvalidArgument)
		if !strings.Contains(err.Error(), say) {
			t.Errorf("%q: %v does not say %q", s, err, say)
		}
	}
}

func FuzzParseLocator(f *testing.F) {
	f.Add("docker.io/library/redis")
	f.Add("[::1]:5000/x")
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseLocator(s)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		if again, err := ParseLocator(l.String()); err != nil || again != l {
			t.Errorf("%q: %+v is read again as %+v, %v", s, l, again, err)
		}
	})
}

func TestParseHints(t *testing.T) {
	for s, want := range map[string]hints{
		"":                            {size: -1},
		"-":                           {size: -1},
		"size:5":                      {size: 5},
		"size:-5":                     {size: -1},
		"size:5x":                     {size: -1},
		"size:99999999999999999999":   {size: -1},
		"offset:7":                    {size: -1, offset: 7},
		"offset:-7":                   {size: -1},
		"range:7-7":                   {size: -1, offset: 7, end: 8},
		"range:0-99":                  {size: -1, end: 100},
		"range:7-6":                   {size: -1},
		"range:7-":                    {size: -1},
		"range:-7":                    {size: -1},
		"range:1-2-3":                 {size: -1},
		"range:+1-2":                  {size: -1},
		"range:1-2,4-5":               {size: -1},
		"range:0-9223372036854775807": {size: -1},
		"range:0-9223372036854775806": {size: -1, end: 1<<63 - 1},
		"mediatype:a/b+c":             {size: -1, mediaType: "a/b+c"},
		"mediatype:a":                 {size: -1},
		"mediatype:a/b\r\nX: y":       {size: -1},
		"mediatype:a/b, c/d":          {size: -1},
		"platform:linux/amd64":        {size: -1},
		"size:1\nsize:2":              {size: -1},
		"url:https://a/b?c:d":         {size: -1, urls: []string{"https://a/b?c:d"}},
	} {
		if want.end == 0 {
			want.end = toEnd
		}
		if got := parseHints([]string{s}); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v", s, got)
		}
	}
}

func TestHelperLocator(t *testing.T) {
	for s, want := range map[string]Locator{
		"http::https://example.org/x": {Helper: "http", Address: "https://example.org/x"},
		"a-1::b::c":                   {Helper: "a-1", Address: "b::c"},
	} {
		if l, err := ParseLocator(s); err != nil || l != want || l.String() != s {
			t.Errorf("%s: %+v, %v", s, l, err)
		}
	}
	for _, s := range []string{"http::", "http::-x", "::x", "-a::x", "A::x", "../a::x/y z::", "a::b\nc"} {
		if l, err := ParseLocator(s); err == nil && l.Helper != "" || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %+v, %v", s, l, err)
		}
	}
}
