//go:build e2e

package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/olareg/olareg"
	"github.com/olareg/olareg/config"
	"golang.org/x/crypto/bcrypt"

	"distkit/testdata/fixture"
	"distkit/testdata/registry/faults"
	"distkit/testdata/registry/layouts"
)

// authority is a private CA, in files: ca.pem, and for each name NAME.pem and NAME.key.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	a.cert = a.sign(t, "ca", &x509.Certificate{
		Subject: pkix.Name{CommonName: "an authority of the tests"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, a.key)
	return a
}

// issue signs a certificate for 127.0.0.1, for a server or a client.
func (a *authority) issue(t *testing.T, name string, usage x509.ExtKeyUsage) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a.sign(t, name, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, a.cert, key)
}

func (a *authority) sign(t *testing.T, name string, c, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = c
	}
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: secret},
	} {
		if err := os.WriteFile(filepath.Join(a.dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// client returns a client that trusts the authority, and has the named certificate, if any.
func (a *authority) client(t *testing.T, name string) *http.Client {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	conf := &tls.Config{RootCAs: roots}
	if name != "" {
		pair, err := tls.LoadX509KeyPair(a.dir+"/"+name+".pem", a.dir+"/"+name+".key")
		if err != nil {
			t.Fatal(err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: conf}}
}

// private starts Debian's registry behind TLS with a private authority and passwords (me:word). With mutual, clients
// need a certificate, too.
func private(t *testing.T, mutual bool) (addr string, a *authority) {
	t.Helper()
	fixture.Need(t, "docker-registry,jq")
	a = newAuthority(t)
	a.issue(t, "server", x509.ExtKeyUsageServerAuth)
	a.issue(t, "client", x509.ExtKeyUsageClientAuth)
	hash, err := bcrypt.GenerateFromPassword([]byte("word"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	users := filepath.Join(a.dir, "users")
	if err := os.WriteFile(users, []byte("me:"+string(hash)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	files := fmt.Sprintf("certificate: %q, key: %q", a.dir+"/server.pem", a.dir+"/server.key")
	if mutual {
		files += fmt.Sprintf(", clientcas: [%q]", a.dir+"/ca.pem")
	}
	dir := filepath.Join(t.TempDir(), "registry")
	addr, held, err := serve("docker-registry", dir, fmt.Sprintf("auth: {htpasswd: {realm: tests, path: %q}}", users), files, a.client(t, "client"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { held.Close() })
	return addr, a
}

func (p *place) write(name, content string) {
	p.t.Helper()
	if !filepath.IsAbs(name) {
		name = filepath.Join(p.dir, name)
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// set adds variables to the environment.
func (p *place) set(vars ...string) { p.Vars = append(p.Vars[:len(p.Vars):len(p.Vars)], vars...) }

// login writes docker's config.json with the user's name and password for the host.
func (p *place) login(host, user string) {
	p.write("docker/config.json", fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte(user))))
	p.set("DOCKER_CONFIG=" + p.dir + "/docker")
}

// images makes links to the test images in ./images.
func (p *place) images() {
	p.t.Helper()
	dir, err := fixture.Images()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := os.Symlink(dir, filepath.Join(p.dir, "images")); err != nil {
		p.t.Fatal(err)
	}
}

// byHand puts an image of a layout, $0, into a repository, $1, as $2, children first. It prints the files in manifests.
const byHand = `put() {
	local from=$1 to=$2 object=$3 name=$4 file child
	file=$(mktemp)
	dist-fetch "$from" "$object" >"$file"
	jq -r '.manifests[]?.digest' "$file" | while read -r child; do put "$from" "$to" "$child" "$child"; done
	jq -r '(.config // empty, .layers[]?) | .digest, .size' "$file" |
		xargs -r -d '\n' -n2 -P4 sh -c 'dist-fetch "$0" "$2" | dist-put "$1" "$2" "size:$3"' "$from" "$to" >&2
	dist-put "$to" "$name" mediatype:"$(jq -r .mediaType "$file")" <"$file"
}
put "$0" "$1" "$2" "$3"`

// peers are other projects' programs. Each script has the host in $0. $tls is set if the host has TLS, with the
// authority in $CA and $CERTS.
var peers = []struct {
	name string
	// read prints the digests of $0/$1:$2: that of its manifest, and those of everything that it refers to, in any
	// order.
	read string
	// push copies the layout $1, or the same image at $0/by/hand:latest, to $0/$2:$3.
	push string
}{
	{"crane", `
crane() { SSL_CERT_FILE=${CA-} command crane "$@"; }
walk() {
	local repository=${1%:*} m=read-${1##*[:/]} d
	repository=${repository%@sha256}
	crane manifest "$1" >"$m" && sha256sum <"$m"
	for d in $(jq -r '.manifests[]?.digest' "$m"); do walk "$repository@$d"; done
	for d in $(jq -r '(.config // empty, .layers[]?) | .digest' "$m"); do crane blob "$repository@$d" | sha256sum; done
}
walk "$0/$1:$2"`, `
crane() { SSL_CERT_FILE=${CA-} command crane "$@"; }
crane copy "$0/by/hand:latest" "$0/$2:$3" 2>/dev/null`},
	{"oras", `
tls=${CA:+--ca-file=$CA}; tls=${tls:---plain-http}
oras() { command oras "$@" "$tls" --registry-config "$DOCKER_CONFIG/config.json"; }
walk() {
	local repository=${1%:*} m=read-${1##*[:/]} d
	repository=${repository%@sha256}
	oras manifest fetch "$1" >"$m" && sha256sum <"$m"
	for d in $(jq -r '.manifests[]?.digest' "$m"); do walk "$repository@$d"; done
	for d in $(jq -r '(.config // empty, .layers[]?) | .digest' "$m"); do oras blob fetch --output - "$repository@$d" | sha256sum; done
}
walk "$0/$1:$2"`, `
tls=${CA:+--to-ca-file=$CA}; tls=${tls:---to-plain-http}
oras cp --from-oci-layout "$1:latest" "$0/$2:$3" "$tls" --to-registry-config "$DOCKER_CONFIG/config.json" >/dev/null`},
	{"skopeo", `
tls=${CERTS:+--src-cert-dir=$CERTS}; tls=${tls:---src-tls-verify=false}
rm -rf read && skopeo copy --all --quiet --authfile "$DOCKER_CONFIG/config.json" "$tls" "docker://$0/$1:$2" dir:read
cd read && for f in $(ls | grep -vx version); do sha256sum <"$f"; done`, `
tls=${CERTS:+--dest-cert-dir=$CERTS}; tls=${tls:---dest-tls-verify=false}
skopeo copy --all --quiet --authfile "$DOCKER_CONFIG/config.json" "$tls" "oci:$1:latest" "docker://$0/$2:$3"`},
}

// ours reads as the peers do, with distkit.
const ours = `
walk() {
	local m=read-$2 d
	dist-fetch "$1" "$2" >"$m" && sha256sum <"$m"
	for d in $(jq -r '.manifests[]?.digest' "$m"); do walk "$1" "$d"; done
	for d in $(jq -r '(.config // empty, .layers[]?) | .digest' "$m"); do dist-fetch "$1" "$d" | sha256sum; done
}
walk "$0/$1" "$2"`

// exchange puts an image by hand and reads it with every peer; then it pushes with every peer, and reads that. The
// bytes are the same each time.
func (p *place) exchange(host string) {
	p.t.Helper()
	p.images()
	sorted := " | LC_ALL=C sort -u"
	want := p.sh("{ "+ours+"; }"+sorted, "./images", "tiny", "latest")
	if n := strings.Count(want, "\n") + 1; n != 9 {
		p.t.Fatalf("an index, two manifests, two configs and four layers are %d lines:\n%s", n, want)
	}
	p.sh(byHand+" >/dev/null", "./images/tiny", host+"/by/hand", "latest", "latest")
	if got := p.sh("{ "+ours+"; }"+sorted, host, "by/hand", "latest"); got != want {
		p.t.Errorf("what we put and read is other:\n%s", difference(want, got))
	}
	// The workflows push back the image that they pulled from there, unchanged.
	p.sh(`dist-pull --root pulled --all-platforms -q "$0/by/hand:latest" >/dev/null && dist-push --root pulled -q "$0/by/hand:latest" "$0/by/push:latest" >/dev/null`, host)
	for _, peer := range peers {
		p.run1(peer.name, func(q *place) {
			fixture.Need(q.t, peer.name)
			for _, repository := range []string{"by/hand", "by/push"} {
				if got := q.sh("{ "+peer.read+"; }"+sorted, host, repository, "latest"); got != want {
					q.t.Errorf("what %s reads of %s is other:\n%s", peer.name, repository, difference(want, got))
				}
			}
			q.sh(peer.push, host, "images/tiny", "from/"+peer.name, "pushed")
			if got := q.sh("{ "+ours+"; }"+sorted, host, "from/"+peer.name, "pushed"); got != want {
				q.t.Errorf("what %s pushed is read as other:\n%s", peer.name, difference(want, got))
			}
			q.sh(`dist-pull --all-platforms -q "$0/from/$1:pushed" >/dev/null`, host, peer.name)
			q.sound()
			if got := q.sh(`dist-tags "$0/from/$1"`, host, peer.name); got != "pushed" {
				q.t.Errorf("tags of what %s pushed: %q", peer.name, got)
			}
		})
	}
	// A tag is deleted, and its manifest stays.
	digest := p.sh(`dist-resolve "$0" latest | jq -r .digest`, host+"/by/hand")
	p.sh(`dist-put "$0" other "mediatype:$(jq -r .mediaType read-latest)" >/dev/null <read-latest`, host+"/by/hand")
	p.sh(`dist-untag "$0" latest`, host+"/by/hand")
	p.fails(3, "dist-resolve", `dist-resolve "$0" latest`, host+"/by/hand")
	p.sh(`dist-fetch "$0" "$1" >/dev/null`, host+"/by/hand", digest)
}

// run1 runs a subtest in the same directory.
func (p *place) run1(name string, f func(*place)) {
	p.t.Run(name, func(t *testing.T) {
		q := *p
		q.t = t
		f(&q)
	})
}

// TestPrivateRegistry uses Debian's registry with passwords, and with a certificate of an authority that only its
// clients know.
func TestPrivateRegistry(t *testing.T) {
	addr, a := private(t, false)
	p := before(t, http.NotFoundHandler())
	p.set("HOST=" + addr)
	toml := func(more string) string {
		return fmt.Sprintf("server = 'https://%s'\n%s", addr, more)
	}
	ca, err := os.ReadFile(a.dir + "/ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	p.write("toml/"+addr+"/hosts.toml", toml("ca = 'own.pem'"))
	p.write("toml/"+addr+"/own.pem", string(ca))
	p.write("insecure/"+addr+"/hosts.toml", toml("skip_verify = true"))
	p.write("docker-certs/"+addr+"/ca.crt", string(ca))
	p.login(addr, "me:word")
	p.write("wrong.json", strings.ReplaceAll(p.sh("cat docker/config.json"), base64.StdEncoding.EncodeToString([]byte("me:word")), base64.StdEncoding.EncodeToString([]byte("me:other"))))
	p.write("none.json", "{}")
	p.write("helper.json", fmt.Sprintf(`{"credHelpers":{%q:"tests"}}`, addr))
	p.write("missing.json", `{"credsStore":"is-missing"}`)
	p.write("bin/docker-credential-tests", "#!/bin/sh\necho '{\"Username\":\"me\",\"Secret\":\"word\"}'\n")
	p.sh("chmod +x bin/docker-credential-tests")
	p.set("PATH=" + p.dir + "/bin:" + os.Getenv("PATH"))

	const hello = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
	put := `printf hello | dist-put -q "$HOST/x" ` + hello + " >/dev/null && "
	for _, tt := range []struct {
		name, script, says string
		status             int
	}{
		{"authority unknown", `dist-fetch --hosts-dir none "$HOST/x" latest`, "TLS", 1},
		{"plain HTTP asked for", `dist-resolve --plain-http --hosts-dir none "$HOST/x" latest`, "HTTPS", 1},
		{"no credentials", `dist-fetch --hosts-dir toml --auth-file none.json "$HOST/x" latest`, "no credentials", 9},
		{"no such file of credentials", `dist-fetch --hosts-dir toml --auth-file nosuch.json "$HOST/x" latest`, "nosuch.json: no such file", 9},
		{"wrong password", `dist-fetch --hosts-dir toml --auth-file wrong.json "$HOST/x" latest`, "", 9},
		{"wrong password, no body", `dist-resolve --hosts-dir toml --auth-file wrong.json "$HOST/x" latest`, "credentials for this host are refused", 9},
		{"helper missing", `dist-fetch --hosts-dir toml --auth-file missing.json "$HOST/x" latest`, "is-missing", 9},
		{"no such image", `dist-fetch --hosts-dir toml "$HOST/x" latest`, "", 3},
	} {
		p.run1(strings.ReplaceAll(tt.name, " ", "_"), func(q *place) {
			name, _, _ := strings.Cut(tt.script, " ")
			if line := q.fails(tt.status, name, tt.script); !strings.Contains(line, tt.says) || strings.Contains(line, "word") {
				q.t.Errorf("it says %s", line)
			}
		})
	}
	for _, hosts := range []string{"toml", "docker-certs", "insecure"} {
		p.sh(`export DIST_HOSTS_DIR=$0; `+put+`[ "$(dist-fetch "$HOST/x" `+hello+`)" = hello ]`, hosts)
	}
	for _, auth := range []string{"--auth-file helper.json", "--auth-file <(cat docker/config.json)"} {
		p.sh(`[ "$(DOCKER_CONFIG=/nonexistent dist-fetch --hosts-dir toml ` + auth + ` "$HOST/x" ` + hello + `)" = hello ]`)
	}
	p.sh(`[ "$(DOCKER_CONFIG=/nonexistent REGISTRY_AUTH_FILE=docker/config.json dist-fetch --hosts-dir toml "$HOST/x" ` + hello + `)" = hello ]`)

	// The upload is refused, too.
	p.fails(9, "dist-put", `printf bye | dist-put --hosts-dir toml --auth-file none.json "$HOST/x" `+
		"sha256:b49f425a7e1f9cff3856329ada223f2f9d368f15a00cf48df16ca95986137fe8")
	p.set("CA="+a.dir+"/ca.pem", "CERTS="+p.dir+"/docker-certs/"+addr, "DIST_HOSTS_DIR="+p.dir+"/docker-certs")
	p.exchange(addr)
	// All processes of a workflow get credentials that can be read only once, and no list of processes shows them.
	p.sh(`export DIST_HOSTS_DIR=toml DOCKER_CONFIG=/nonexistent
push() { dist-push --root piped "${@:2}" "$HOST/by/push:latest" "$HOST/by/pipe:$1" >/dev/null; }
dist-pull --root piped --all-platforms --auth-file <(cat docker/config.json) -q "$HOST/by/push:latest" >/dev/null
dist-pull --root second --all-platforms --auth-file=/dev/stdin -q "$HOST/by/push:latest" <docker/config.json >/dev/null
REGISTRY_AUTH_FILE=/dev/stdin push 1 < <(cat docker/config.json)
push 2 --auth-file <(cat docker/config.json)
test -z "$(find "$XDG_RUNTIME_DIR" /dev/shm -name 'tmp.*' -user "$(id -u)" -newer wrong.json)"`)
}

// TestClientCertificate uses a registry that accepts only clients with a certificate of its authority.
func TestClientCertificate(t *testing.T) {
	addr, a := private(t, true)
	p := before(t, http.NotFoundHandler())
	p.login(addr, "me:word")
	p.set("HOST="+addr, "FROM="+a.dir)
	p.sh(`mkdir -p "docker/$HOST" "toml/$HOST" "none/$HOST" && cp "$FROM/ca.pem" "docker/$HOST/ca.crt" && cp "$FROM/ca.pem" "none/$HOST/ca.crt"
cp "$FROM/client.pem" "docker/$HOST/client.cert" && cp "$FROM/client.key" "docker/$HOST/client.key"
printf 'server = "https://%s"\nca = "%s"\nclient = [["%s", "%s"]]\n' "$HOST" "$FROM/ca.pem" "$FROM/client.pem" "$FROM/client.key" >"toml/$HOST/hosts.toml"`)
	for _, hosts := range []string{"docker", "toml"} {
		p.fails(3, "dist-resolve", `dist-resolve --hosts-dir "$0" "$HOST/x" latest`, hosts)
	}
	if line := p.fails(1, "dist-resolve", `dist-resolve --hosts-dir none "$HOST/x" latest`); !strings.Contains(line, "TLS") {
		t.Errorf("it says %s", line)
	}
}

// TestPullThrough uses Debian's registry as a mirror of docker.io, in hosts.toml.
func TestPullThrough(t *testing.T) {
	fixture.Need(t, "docker-registry,jq")
	dir, err := fixture.Images()
	if err != nil {
		t.Fatal(err)
	}
	var direct atomic.Int64 // the number of blobs that were requested by others than the mirror
	registry := layouts.New(dir, true)
	p := before(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.UserAgent() == "distkit" && strings.Contains(r.URL.Path, "/blobs/") {
			direct.Add(1)
		}
		registry.ServeHTTP(w, r)
	}))
	mirror, held, err := serve("docker-registry", filepath.Join(t.TempDir(), "mirror"), fmt.Sprintf("proxy: {remoteurl: \"http://%s\"}", p.Addr), "", http.DefaultClient)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	p.write("hosts/docker.io/hosts.toml", fmt.Sprintf("server = 'http://%s'\n[host.'http://%s']\ncapabilities = ['pull', 'resolve']\n", p.Addr, mirror))
	p.set("DIST_HOSTS_DIR=" + p.dir + "/hosts")
	first := p.sh("dist-pull -q " + image)
	p.sound()
	if n := direct.Load(); n != 0 {
		t.Errorf("%d blobs went past the mirror", n)
	}
	p.Reset()
	if again := p.sh("dist-pull --root second -q " + image); again != first {
		t.Errorf("again: %q, not %q", again, first)
	}
	if s := p.Stats(); s["blobs"].Get != 0 {
		t.Errorf("what the mirror has was fetched from upstream: %+v", p.Log())
	}
	// An object that upstream does not have is not in the mirror. The error is upstream's, and not the mirror's.
	p.fails(3, "dist-resolve", "dist-resolve docker.io/library/redis none")
	// Without the mirror, upstream is asked. Without upstream, the mirror serves the objects that it has.
	p.Add(faults.Fault{Kind: "status", Arg: "503"})
	digest := p.sh(`dist-image layers ` + image + ` | head -n1 | cut -f1`)
	p.sh(`dist-fetch docker.io/library/redis "$0" | cmp - "$(dist-path -n "$0")"`, digest)
	p.Clear()
	held.Close()
	for range 6000 {
		c, err := net.Dial("tcp", mirror)
		if err != nil {
			break
		}
		c.Close()
		time.Sleep(10 * time.Millisecond)
	}
	if third := p.sh("dist-pull --root third -q " + image); third != first {
		t.Errorf("without the mirror: %q, not %q", third, first)
	}
}

// olaregAt makes a directory with an olareg registry, whose authentication is made when its address is known.
func olaregAt(t *testing.T, limit int, auth func(p *place) config.ConfigAuth) *place {
	t.Helper()
	fixture.Need(t, "jq")
	var server *olareg.Server
	p := before(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { server.ServeHTTP(w, r) }))
	yes := true
	c := config.Config{
		Storage: config.ConfigStorage{StoreType: config.StoreMem},
		// Short pages of referrers.
		API: config.ConfigAPI{RateLimit: limit, DeleteEnabled: &yes, Referrer: config.ConfigAPIReferrer{Limit: 700}},
	}
	if auth != nil {
		c.Auth = auth(p)
	}
	server = olareg.New(c)
	t.Cleanup(func() { server.Close() })
	p.set("HOST=" + p.Addr)
	return p
}

// tokens is olareg's token server, and basic its passwords. me:word may do everything.
func tokens(p *place) config.ConfigAuth {
	return config.NewAuthTokenOpaque(p.users(), config.WithAuthRealm("http://"+p.Addr+"/token"))
}

func basic(p *place) config.ConfigAuth { return config.NewAuthBasicFile(p.users()) }

func (p *place) users() string {
	hash, err := bcrypt.GenerateFromPassword([]byte("word"), bcrypt.MinCost)
	if err != nil {
		p.t.Fatal(err)
	}
	file := filepath.Join(p.dir, "users.yaml")
	p.write(file, fmt.Sprintf("users: {me: {cred: %q}}\nacls: [{repo: '*', members: [me], access: ['*']}]\n", hash))
	return file
}

// asked counts the requests whose "METHOD path" contains a text.
func (p *place) asked(piece string) int {
	n := 0
	for _, r := range p.Log() {
		if strings.Contains(r.Method+" "+r.Path, piece) {
			n++
		}
	}
	return n
}

func TestOlareg(t *testing.T) {
	for name, auth := range map[string]func(*place) config.ConfigAuth{
		"open":   nil,
		"tokens": tokens,
		"basic":  basic,
	} {
		t.Run(name, func(t *testing.T) {
			p := olaregAt(t, 0, auth)
			if auth != nil {
				p.fails(9, "dist-fetch", `dist-fetch "$HOST/x" latest`)
				p.fails(9, "dist-put", `echo '{}' | dist-put "$HOST/x" latest mediatype:application/vnd.oci.image.manifest.v1+json`)
				p.login(p.Addr, "me:other")
				p.fails(9, "dist-resolve", `dist-resolve "$HOST/x" latest`)
			}
			p.login(p.Addr, "me:word")
			p.exchange(p.Addr)
			p.referrers()
		})
	}
}

// referrers attaches referrers to an image by hand and with oras, and lists them with both.
func (p *place) referrers() {
	p.t.Helper()
	p.sh(`file=$(mktemp)
dist-fetch "$HOST/by/hand" other >/dev/null
subject=$(dist-resolve "$HOST/by/hand" other | jq -c .)
printf '{}' | dist-put "$HOST/by/hand" sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a >/dev/null
for i in 1 2 3 4 5; do
	jq -nc --argjson subject "$subject" --arg i "$i" '{schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json",
		artifactType: "tests/hand", annotations: {i: $i}, layers: [{mediaType: "application/vnd.oci.empty.v1+json", digest: "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", size: 2}],
		config: {mediaType: "application/vnd.oci.empty.v1+json", digest: "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", size: 2}, subject: ($subject | {mediaType, digest, size})}' >"$file"
	dist-put "$HOST/by/hand" "sha256:$(sha256sum <"$file" | cut -d' ' -f1)" mediatype:application/vnd.oci.image.manifest.v1+json <"$file" >/dev/null
done`)
	list := `dist-referrers "$HOST/by/hand" "$(dist-resolve "$HOST/by/hand" other | jq -r .digest)" `
	if got := p.sh(list + `--json | jq -r .annotations.i | sort | paste -sd ' '`); got != "1 2 3 4 5" {
		p.t.Errorf("referrers: %q", got)
	}
	p.run1("oras_referrers", func(q *place) {
		fixture.Need(q.t, "oras")
		oras := `oras() { command oras "$@" --plain-http --registry-config "$DOCKER_CONFIG/config.json"; }; `
		if got := q.sh(oras + `oras discover --format json "$HOST/by/hand:other" | jq -r '(.referrers // .manifests)[].annotations.i' | sort | paste -sd ' '`); got != "1 2 3 4 5" {
			q.t.Errorf("oras sees %q", got)
		}
		q.sh(oras + `echo signed >note && oras attach --artifact-type tests/oras "$HOST/by/hand:other" note:text/plain >/dev/null`)
		if got := q.sh(list + `--artifact-type tests/oras --json | jq -r .digest | while read -r d; do dist-fetch "$HOST/by/hand" "$(dist-fetch "$HOST/by/hand" "$d" | jq -r '.layers[0].digest')"; done`); got != "signed" {
			q.t.Errorf("what oras attached is read as %q", got)
		}
	})
}

// TestBetweenProcesses checks that ten processes at the same time make the requests that one would make.
func TestBetweenProcesses(t *testing.T) {
	p := olaregAt(t, 0, tokens)
	p.write("docker/config.json", fmt.Sprintf(`{"credHelpers":{%q:"tests"}}`, p.Addr))
	p.write("bin/docker-credential-tests", "#!/bin/sh\necho \"$1\" >>"+p.dir+"/calls\nsleep 0.2\necho '{\"Username\":\"me\",\"Secret\":\"word\"}'\n")
	p.sh("chmod +x bin/docker-credential-tests && touch calls")
	p.set("PATH="+p.dir+"/bin:"+os.Getenv("PATH"), "DOCKER_CONFIG="+p.dir+"/docker")
	p.sh(`for i in $(seq 10); do echo "blob $i" >b && dist-put -q "$HOST/x" "sha256:$(sha256sum <b | cut -d' ' -f1)" <b; done >digests`)
	p.sh(`: >calls; rm -rf "$XDG_RUNTIME_DIR/distkit"`)
	p.Reset()
	got := p.sh(`xargs -n1 -P10 dist-fetch "$HOST/x" <digests | sort`)
	if want := p.sh(`for i in $(seq 10); do echo "blob $i"; done | sort`); got != want {
		t.Errorf("they fetched %q", got)
	}
	// Each process asks the helper once, because the helper may have another login by then, for which the token is not
	// valid.
	if calls := p.sh("sort calls | uniq -c"); strings.Join(strings.Fields(calls), " ") != "10 get" {
		t.Errorf("the helper was called %q", calls)
	}
	if n := p.asked("GET /token"); n != 1 {
		t.Errorf("%d tokens were asked for", n)
	}
	// The next ten processes have the token, and send it with their first request.
	p.Reset()
	p.sh(`xargs -n1 -P10 dist-fetch "$HOST/x" <digests >/dev/null`)
	if n := len(p.Log()); n != 10 {
		t.Errorf("%d requests for ten blobs: %+v", n, p.Log())
	}
	if mode := p.sh(`stat -c %a "$XDG_RUNTIME_DIR/distkit" "$XDG_RUNTIME_DIR"/distkit/* | sort -u | paste -sd ' '`); mode != "600 700" {
		t.Errorf("modes %s", mode)
	}
}

// TestBusyRegistry checks that all processes wait if the registry asks one of them to, and that more requests than it
// can take succeed in the end.
func TestBusyRegistry(t *testing.T) {
	var mu sync.Mutex
	var until time.Time // the registry refuses requests before this time
	early, refused := 0, 0
	p := olaregAt(t, 0, nil)
	p.sh(`for i in $(seq 10); do echo "blob $i" >b && dist-put -q "$HOST/x" "sha256:$(sha256sum <b | cut -d' ' -f1)" <b; done >digests`)
	registry, err := url.Parse("http://" + p.Addr)
	if err != nil {
		t.Fatal(err)
	}
	proxy := quiet(httputil.NewSingleHostReverseProxy(registry))
	q := before(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		switch now := time.Now(); {
		case until.IsZero():
			refused++
			until = now.Add(2 * time.Second)
			w.Header().Set("Retry-After", "2")
			w.WriteHeader(http.StatusTooManyRequests)
			mu.Unlock()
			return
		case now.Before(until):
			early++
		}
		mu.Unlock()
		proxy.ServeHTTP(w, r)
	}))
	q.set("HOST="+q.Addr, "DIGESTS="+p.dir+"/digests")
	got := q.sh(`dist-fetch "$HOST/x" "$(head -n1 "$DIGESTS")" 2>first >blob & until grep -q 'asks to wait 2s' first 2>/dev/null; do sleep 0.01; done
xargs -n1 -P10 dist-fetch "$HOST/x" <"$DIGESTS" 2>others | wc -l; wait $!; grep -c 'another process' others; cat blob`)
	if got != "10\n10\nblob 1" {
		t.Errorf("it printed %q", got)
	}
	if refused != 1 || early != 0 {
		t.Errorf("%d refused, %d came though the registry had asked to wait", refused, early)
	}

	// Five requests a second, from ten processes at the same time.
	p = olaregAt(t, 5, nil)
	p.sh(`echo hello | dist-put -q "$HOST/x" sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03 >digest 2>/dev/null`)
	p.Reset()
	if got := p.sh(`for i in $(seq 20); do cat digest; done | xargs -n1 -P10 dist-fetch "$HOST/x" 2>/dev/null | wc -l`); got != "20" {
		t.Errorf("%s of 20 fetches came through", got)
	}
	if n := len(p.Log()); n > 80 {
		t.Errorf("%d requests for 20 fetches", n)
	}
}
