package remotes

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Processes of one user share what they learn about registries in files (0600) of a directory (0700, see sharedPlaces):
//
//   - bearer tokens, fetched under a lock, so that ten processes fetch one
//   - until when a registry wants no requests
//   - which mirrors don't reply, or have a corrupt blob
//   - upload sessions of processes that died (savedUpload)
//
// Passwords are never shared. Without a trustworthy directory, processes share nothing.

const (
	tokenLife     = 55 * time.Second // for tokens that don't state their life; the specification's minimum is 60 s
	tokenMargin   = 10 * time.Second
	maxTokenFile  = 64 << 10
	maxSharedWait = 5 * time.Minute
	staleToken    = 24 * time.Hour
	staleUpload   = 7 * 24 * time.Hour // registries drop sessions earlier than that
	lockPatience  = 15 * time.Second   // how long to wait for another process that is fetching a token
)

// sharedPlaces returns candidates for the shared directory, the best first. The state of running containers uses the
// same names.
var sharedPlaces = func() (dirs []string) {
	uid := strconv.Itoa(os.Geteuid())
	if runtime := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(runtime) {
		dirs = append(dirs, filepath.Join(runtime, "distkit"))
	}
	dirs = append(dirs, filepath.Join("/run/user", uid, "distkit"))
	if uid == "0" {
		dirs = append(dirs, "/run/distkit")
	}
	if temp := os.TempDir(); filepath.IsAbs(temp) {
		dirs = append(dirs, filepath.Join(temp, "distkit-"+uid))
	}
	return dirs
}

// sharedDir returns the shared directory, and creates it if need be. It is "" if no place can be trusted.
func sharedDir() string {
	for _, dir := range sharedPlaces() {
		if disk.PrivateDir(dir) {
			return dir
		}
	}
	return ""
}

// sharedFile opens the shared file identified by parts. It must belong to this user alone.
func sharedFile(dir, kind string, flags int, parts ...string) (*os.File, error) {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	name := filepath.Join(dir, kind+"-"+hex.EncodeToString(h.Sum(nil)[:16]))
	f, err := os.OpenFile(name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		f.Close()
		return nil, os.ErrPermission
	}
	return f, nil
}

// sweepShared removes expired files, because not every such directory is emptied at the end of a session.
func sweepShared(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		age := staleToken
		switch kind, _, _ := strings.Cut(e.Name(), "-"); kind {
		case "token", "wait", "down", "corrupt", "referrers":
		case "upload":
			age = staleUpload
		default:
			continue // state of a running container
		}
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() && time.Since(info.ModTime()) > age {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

// tokenCache is oras' token cache, extended by the tokens of other processes.
type tokenCache struct {
	auth.Cache
	login *login
	dir   string // the shared directory; "" if there is none
	who   string // identifies the endpoint and the credentials for the repository
	mu    sync.Mutex
	tried map[string]bool     // tokens of other processes that were used: one that is asked for again was refused
	stale map[string]bool     // tokens that the registry refused
	kept  map[string][]string // for each token, the registry and the scopes that name its file
}

func newTokenCache(e endpoint, l *login, dir string) *tokenCache {
	// Tokens depend on the credential, so they change with a login, a logout or another repository's credential.
	who := fmt.Sprintf("%s://%s%s %s", e.scheme, hostPort(e.scheme, e.host), e.path, l.identity)
	return &tokenCache{Cache: auth.NewCache(), login: l, dir: dir, who: who, tried: map[string]bool{}, stale: map[string]bool{}, kept: map[string][]string{}}
}

type sharedToken struct {
	Token   string    `json:"token"`
	Expires time.Time `json:"expires"`
	// Credential is the fingerprint of the credential that the token was obtained with. A helper may return a different
	// credential later.
	Credential string `json:"credential"`
}

// read returns a file's token, or the zero value if it has expired.
func (c *tokenCache) read(f *os.File) (t sharedToken) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return t
	}
	if json.NewDecoder(io.LimitReader(f, maxTokenFile)).Decode(&t) != nil || time.Now().After(t.Expires) {
		return sharedToken{}
	}
	return t
}

func (c *tokenCache) file(flags int, registry, key string) (*os.File, error) {
	if c.dir == "" {
		return nil, os.ErrNotExist
	}
	return sharedFile(c.dir, "token", flags, c.who, registry, key)
}

// get returns another process's token that this process hasn't tried, if it was obtained with the credential that this
// process would use.
func (c *tokenCache) get(ctx context.Context, registry, key string) string {
	f, err := c.file(os.O_RDONLY, registry, key)
	if err != nil {
		return ""
	}
	defer f.Close()
	t := c.read(f)
	if t.Token == "" || c.isTried(t.Token) {
		return ""
	}
	// This check comes last, because it may run a helper.
	if own, err := c.login.credential(ctx); err != nil || fingerprint(own) != t.Credential {
		return ""
	}
	return t.Token
}

func (c *tokenCache) isTried(token string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tried[token]
}

// use marks a token as tried, and records its file.
func (c *tokenCache) use(token, registry, key string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tried[token] = true
	c.kept[token] = []string{registry, key}
	return token
}

// refuse drops a token that the registry refused, for all processes. It returns false if the token was dropped before.
func (c *tokenCache) refuse(token string) bool {
	c.mu.Lock()
	known, kept := c.stale[token], c.kept[token]
	c.stale[token] = true
	c.mu.Unlock()
	if known || kept == nil {
		return !known
	}
	if f, err := c.file(os.O_RDWR, kept[0], kept[1]); err == nil {
		defer f.Close()
		if disk.Lock(f, unix.LOCK_EX|unix.LOCK_NB) == nil && c.read(f).Token == token {
			_ = f.Truncate(0)
		}
	}
	return true
}

// own returns a token from this process's cache, unless it was refused.
func (c *tokenCache) own(ctx context.Context, registry string, scheme auth.Scheme, key string) (string, error) {
	token, err := c.Cache.GetToken(ctx, registry, scheme, key)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && c.stale[token] {
		return "", errdefs.ErrNotFound
	}
	return token, err
}

// GetScheme returns Bearer if another process has a token for the registry.
func (c *tokenCache) GetScheme(ctx context.Context, registry string) (auth.Scheme, error) {
	scheme, err := c.Cache.GetScheme(ctx, registry)
	if err != nil && c.get(ctx, registry, strings.Join(auth.GetAllScopesForHost(ctx, registry), " ")) != "" {
		return auth.SchemeBearer, nil
	}
	return scheme, err
}

// GetToken looks for a token in this process's cache, and then in those of others.
func (c *tokenCache) GetToken(ctx context.Context, registry string, scheme auth.Scheme, key string) (string, error) {
	token, err := c.own(ctx, registry, scheme, key)
	if err != nil && scheme == auth.SchemeBearer {
		if shared := c.get(ctx, registry, key); shared != "" {
			return c.use(shared, registry, key), nil
		}
	}
	return token, err
}

// Set fetches a token, unless another process is doing so or just did.
func (c *tokenCache) Set(ctx context.Context, registry string, scheme auth.Scheme, key string, fetch func(context.Context) (string, error)) (string, error) {
	if scheme != auth.SchemeBearer {
		return c.Cache.Set(ctx, registry, scheme, key, fetch)
	}
	return c.Cache.Set(ctx, registry, scheme, key, func(ctx context.Context) (string, error) {
		f, err := c.file(os.O_RDWR|os.O_CREATE, registry, key)
		if err != nil {
			token, _, err := c.fetch(ctx, fetch)
			return token, err
		}
		defer f.Close()
		_, _ = c.login.credential(ctx) // before taking the lock, because it may run a helper
		locked := waitLock(ctx, f)
		if token := c.get(ctx, registry, key); token != "" {
			return c.use(token, registry, key), nil
		}
		if info, err := f.Stat(); err == nil && info.Size() == 0 {
			sweepShared(c.dir)
		}
		token, by, err := c.fetch(ctx, fetch)
		if err == nil && locked && token != by.AccessToken {
			b, _ := json.Marshal(sharedToken{token, expiry(token), fingerprint(by)})
			if len(b) <= maxTokenFile && f.Truncate(0) == nil {
				_, _ = f.WriteAt(b, 0)
			}
			c.use(token, registry, key)
		}
		return token, err
	})
}

// fetch fetches a token with the login's credential, or without it if the token server must not get it. It returns the
// credential that was used.
func (c *tokenCache) fetch(ctx context.Context, fetch func(context.Context) (string, error)) (token string, by auth.Credential, err error) {
	if state, ok := ctx.Value(authStateKey{}).(*authState); ok {
		state.fetched.Store(true)
	}
	if by, err = c.login.credential(ctx); err != nil {
		return "", by, err
	}
	token, err = fetch(context.WithValue(ctx, tokenRequestKey{}, true))
	var refused *refusedError
	if errors.As(err, &refused) && refused.origin != "" {
		c.login.withhold(refused.origin)
		by = auth.EmptyCredential
		token, err = fetch(context.WithValue(ctx, tokenRequestKey{}, false))
	}
	return token, by, err
}

// waitLock locks a file. It gives up if another process holds the lock for long.
func waitLock(ctx context.Context, f *os.File) bool {
	for deadline := time.Now().Add(lockPatience); ; {
		err := disk.Lock(f, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return true
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			return false
		}
		if sleep(ctx, 10*time.Millisecond) != nil {
			return false
		}
	}
}

// expiry returns the expiry time of a token, which is stated if it is a JWT.
func expiry(token string) time.Time {
	end := time.Now().Add(tokenLife)
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return end
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Exp int64 `json:"exp"`
	}
	if err == nil && json.Unmarshal(b, &claims) == nil && claims.Exp > 0 {
		return time.Unix(claims.Exp, 0).Add(-tokenMargin)
	}
	return end
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// deadlineFile opens the file that says until when a condition holds, such as that a host is down. That time is the
// file's modification time; an empty file means that the condition doesn't hold. It returns nil if nothing is shared,
// or if the file doesn't exist and flags lack O_CREATE.
func (c *client) deadlineFile(flags int, kind string, parts ...string) *os.File {
	if c.shared == "" {
		return nil
	}
	f, err := sharedFile(c.shared, kind, os.O_RDWR|flags, parts...)
	if err != nil {
		return nil
	}
	return f
}

// timeLeft returns how long a file's condition still holds. It is not positive if it doesn't.
func timeLeft(f *os.File) time.Duration {
	info, err := f.Stat()
	if err != nil || info.Size() == 0 {
		return 0
	}
	return time.Until(info.ModTime())
}

func setDeadline(f *os.File, after time.Duration) {
	_, _ = f.WriteAt([]byte("."), 0)
	tv := unix.NsecToTimeval(time.Now().Add(after).UnixNano())
	_ = unix.Futimes(int(f.Fd()), []unix.Timeval{tv, tv})
}

// postpone tells all processes with this login that the host wants no requests for a while.
func (c *client) postpone(after time.Duration) {
	f := c.deadlineFile(os.O_CREATE, "wait", c.scheme, c.host, c.login.identity)
	if f == nil {
		return
	}
	defer f.Close()
	if timeLeft(f) < after {
		setDeadline(f, after)
	}
}

// errToldToWait reports that another process got a Retry-After, and that this process can't or doesn't want to wait so
// long.
var errToldToWait error = errclass.As(errors.New("has asked another process to wait"), errdefs.ErrResourceExhausted)

// sharedWait returns how long the host wants no requests.
func (c *client) sharedWait() time.Duration {
	f := c.deadlineFile(0, "wait", c.scheme, c.host, c.login.identity)
	if f == nil {
		return 0
	}
	defer f.Close()
	return timeLeft(f)
}

func (c *client) toldToWait(wait time.Duration) error {
	return fmt.Errorf("%s %w, for %v from now", c.host, errToldToWait, wait.Round(time.Second))
}

// waitShared waits as long as the host told another process to wait.
func (c *client) waitShared(ctx context.Context) error {
	wait := c.sharedWait()
	if wait <= 0 {
		return nil
	}
	if wait > c.options.MaxWait {
		return c.toldToWait(wait)
	}
	if c.options.Notify != nil && wait >= time.Second {
		c.options.Notify(fmt.Sprintf("%s has asked another process to wait: %v from now", c.host, wait.Round(time.Second)))
	}
	// Add a random time, so that processes don't come back together.
	return sleep(ctx, wait+rand.N(wait/8+time.Millisecond))
}

// downTime is how long processes skip a host that didn't reply, if they have another one.
const downTime = 30 * time.Second

// isDown reports whether another process found that the host doesn't reply. After downTime the first process that asks
// gets false and so probes the host; the others skip it for another downTime, or until the host has replied.
func (c *client) isDown() bool {
	f := c.deadlineFile(0, "down", c.scheme, c.host)
	if f == nil {
		return false
	}
	defer f.Close()
	if disk.Lock(f, unix.LOCK_EX|unix.LOCK_NB) != nil || timeLeft(f) > 0 {
		return true
	}
	if info, err := f.Stat(); err == nil && info.Size() > 0 {
		setDeadline(f, downTime)
	}
	return false
}

// markDown records whether the host replied, for a host that isn't the last one to try.
func (c *client) markDown(err error) {
	var noReply *noReplyError
	var stall *stallError
	var status *statusError
	switch {
	case errors.As(err, &noReply), errors.As(err, &stall):
		if f := c.deadlineFile(os.O_CREATE, "down", c.scheme, c.host); f != nil {
			setDeadline(f, downTime)
			f.Close()
		}
	case err == nil, errors.As(err, &status):
		if f := c.deadlineFile(0, "down", c.scheme, c.host); f != nil {
			_ = f.Truncate(0)
			f.Close()
		}
	}
}

// corruptTime is how long a host is skipped for a blob for which it sent wrong bytes.
const corruptTime = time.Hour

// markCorrupt records that the host sent wrong bytes for a digest.
func (c *client) markCorrupt(o object) {
	if f := c.deadlineFile(os.O_CREATE, "corrupt", c.scheme, c.host, c.path, o.String()); f != nil {
		setDeadline(f, corruptTime)
		f.Close()
	}
}

func (c *client) isCorrupt(o object) bool {
	f := c.deadlineFile(0, "corrupt", c.scheme, c.host, c.path, o.String())
	if f == nil {
		return false
	}
	defer f.Close()
	return timeLeft(f) > 0
}
