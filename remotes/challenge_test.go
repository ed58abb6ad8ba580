package remotes

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Bearer challenge with a realm is used, or else Basic, after any number of other challenges, in one field or in
// several.
func TestChooseChallenge(t *testing.T) {
	const bearer = `Bearer realm="http://h/t", service="s", scope="a b"`
	for _, c := range []struct {
		fields  []string
		want    string
		refused string
	}{
		{[]string{bearer}, bearer, ""},
		{[]string{"Negotiate", "NTLM", `Basic realm="x"`}, `Basic realm="x"`, ""},
		{[]string{"Negotiate, NTLM, Basic realm=x"}, `Basic realm="x"`, ""},
		{[]string{"Negotiate YII/abc==, " + bearer + `, Basic realm="x"`}, bearer, ""},
		{[]string{`Basic realm="x"`, bearer}, bearer, ""},
		{[]string{`Basic realm="x, Bearer realm=y", ` + bearer}, bearer, ""},
		{[]string{`Digest realm="d", nonce="a,b", qop=auth, ` + `Basic realm="x"`}, `Basic realm="x"`, ""},
		{[]string{`Basic`}, `Basic`, ""},
		{[]string{` , ,basic  realm = "x\"y" ,charset="UTF-8"`}, `basic realm="x\"y"`, ""},
		{[]string{`BEARER REALM="http://h/t?a=b&c=d,e", Scope=repository:x:pull,push`}, `BEARER realm="http://h/t?a=b&c=d,e", scope="repository:x:pull"`, ""},
		{[]string{`Bearer realm="http://h/1",realm="http://h/2"`}, `Bearer realm="http://h/1"`, ""},
		{[]string{`Bearer`, `Basic realm="x"`}, `Basic realm="x"`, ""},
		{[]string{`Bearer realm=""`}, "", "Bearer"},
		{[]string{"Negotiate", "NTLM TlRM", "Negotiate"}, "", "Negotiate NTLM"},
		{[]string{`Bearer realm="http://h/t`}, `Bearer realm="http://h/t"`, ""},
		{[]string{"", ",", "=", `"`, `""="",`}, "", ""},
		{nil, "", ""},
	} {
		h := http.Header{"Www-Authenticate": c.fields}
		refused := strings.Join(chooseChallenge(h), " ")
		got := strings.Join(h["Www-Authenticate"], " | ")
		if got != c.want || refused != c.refused {
			t.Errorf("%q: %q, refused %q", c.fields, got, refused)
		}
	}
}

// Parsing takes time in proportion to the size of the header, which is at most a mebibyte.
func TestChallengeEnormous(t *testing.T) {
	for _, unit := range []string{"a ", "a,", "a=", `a="`, `a="b",`, `"`, `\`, "Bearer ", "Bearer realm=x,", "=", "é"} {
		h := http.Header{"Www-Authenticate": {strings.Repeat(unit, (1<<20)/len(unit))}}
		if n := testing.AllocsPerRun(1, func() { parseChallenges(h["Www-Authenticate"][0]) }); n > 3<<20 {
			t.Errorf("%q: %v allocations", unit, n)
		}
		if refused := chooseChallenge(h); len(refused) > 5 {
			t.Errorf("%d schemes are told", len(refused))
		}
	}
}

// A registry may offer any scheme. If none is supported, the error names them.
func TestChallengesOffered(t *testing.T) {
	for _, c := range []struct {
		fields []string
		works  bool
	}{
		{[]string{"Negotiate", `Basic realm="x"`}, true},
		{[]string{`Negotiate, NTLM, Basic realm="x"`}, true},
		{[]string{`Digest realm="x", nonce="n, Basic", Basic realm="x"`}, true},
		{[]string{"Negotiate", "NTLM"}, false},
		{[]string{`Digest realm="x", nonce="Basic"`}, false},
	} {
		f := newFake(t)
		f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if user, password, _ := r.BasicAuth(); user+":"+password == "me:word" {
				return false
			}
			for _, field := range c.fields {
				w.Header().Add("WWW-AUTHENTICATE", field)
			}
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		dockerConfig(t, `{"auths":{"`+f.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
		_, err := fetch(t, open(t, f.host(), Options{}), "latest")
		if c.works && err != nil {
			t.Errorf("%q: %v", c.fields, err)
		} else if !c.works {
			is(t, err, errdefs.IsUnauthorized)
			if scheme, _, _ := strings.Cut(c.fields[0], " "); !strings.Contains(err.Error(), "authentication by "+scheme) {
				t.Errorf("%q: %v", c.fields, err)
			}
		}
	}
}

// Unusual replies of token servers.
func TestTokenReplies(t *testing.T) {
	for _, c := range []struct {
		path, reply string
		works       bool
	}{
		{"/token", `{"token":"good"}`, true},
		{"/token", `{"access_token":"good"}`, true},
		{"/token", `{"token":"good","expires_in":"soon"}`, true},
		{"/token", `{"token":"good","expires_in":-5,"issued_at":"yesterday"}`, true},
		{"/token", `{"token":"old","access_token":"good","expires_in":300}`, true},
		{"/realm/of/a?tenant=b,c&account=d", `{"token":"good"}`, true},
		{"/token", `{"token":null}`, false},
		{"/token", `{"token":["good"]}`, false},
		{"/token", `{"token":"go\r\nX-Evil: od"}`, false},
		{"/token", `[]`, false},
	} {
		f := newFake(t)
		f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
		asked := ""
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if !strings.HasPrefix(r.URL.Path, "/v2/") {
				asked = r.URL.RequestURI()
				fmt.Fprint(w, c.reply)
				return true
			}
			if r.Header.Get("Authorization") == "Bearer good" {
				return false
			}
			w.Header().Set("Www-Authenticate", `Bearer realm="`+f.URL+c.path+`",service="s"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		_, err := fetch(t, open(t, f.host(), Options{}), "latest")
		if c.works && err != nil {
			t.Errorf("%+v: %v", c, err)
		} else if !c.works && err == nil {
			t.Errorf("%+v is taken", c)
		} else if !c.works {
			is(t, err, func(error) bool { return true })
		}
		if path, query, _ := strings.Cut(c.path, "?"); !strings.HasPrefix(asked, path+"?") || query != "" && !strings.Contains(asked, "tenant=b%2Cc") {
			t.Errorf("%s: asked for %s", c.path, asked)
		}
	}
}
