package serve

import (
	"bufio"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/bcrypt"
)

// Users are names and the bcrypt hashes of their passwords.
type Users struct {
	hashes map[string][]byte
	// decoy is the hash that a password is compared with if there is no such user: the reply takes as long as for one that exists.
	decoy []byte

	// A client sends its password with each request, and bcrypt is slow on purpose. What was right once is remembered by a
	// keyed hash for as long as the process lives.
	key   []byte
	mu    sync.Mutex
	right map[[sha256.Size]byte]bool
	// slow bounds how many passwords are compared at the same time.
	slow slots
}

// maxUsersFile bounds what is read of a file of users, in bytes.
const maxUsersFile = 8 << 20

// ReadUsers reads lines USER:HASH, as htpasswd -B writes them. InvalidArgument for a hash that is not bcrypt's.
func ReadUsers(r io.Reader) (*Users, error) {
	u := &Users{hashes: map[string][]byte{}, key: make([]byte, 32), right: map[[sha256.Size]byte]bool{}}
	_, _ = rand.Read(u.key) // it never fails
	cost := bcrypt.MinCost
	lines := bufio.NewScanner(io.LimitReader(r, maxUsersFile))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		name, hash, ok := strings.Cut(line, ":")
		c, err := bcrypt.Cost([]byte(hash))
		if !ok || name == "" || err != nil {
			return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "line %d: not USER:HASH with a hash of bcrypt, as htpasswd -B writes it", n)
		}
		u.hashes[name], cost = []byte(hash), max(cost, c)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(u.hashes) == 0 {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "it names no user")
	}
	var err error
	u.decoy, err = bcrypt.GenerateFromPassword([]byte("no password"), cost)
	if err != nil {
		return nil, fmt.Errorf("hash a password: %w", err)
	}
	return u, nil
}

// maxRight bounds how many right passwords are remembered: a user has few spellings of one.
const maxRight = 1 << 10

// allow reports whether a request has the name and the password of a user. It fails only if the client has gone.
func (u *Users) allow(r *http.Request) (bool, error) {
	name, password, ok := r.BasicAuth()
	if !ok {
		return false, nil
	}
	mac := hmac.New(sha256.New, u.key)
	fmt.Fprintf(mac, "%d:%s:%s", len(name), name, password)
	sum := [sha256.Size]byte(mac.Sum(nil))
	u.mu.Lock()
	known := u.right[sum]
	u.mu.Unlock()
	if known {
		return true, nil
	}
	release, err := u.slow.take(r.Context(), 2)
	if err != nil {
		return false, err
	}
	defer release()
	hash, exists := u.hashes[name]
	if !exists {
		hash = u.decoy
	}
	if bcrypt.CompareHashAndPassword(hash, []byte(password)) != nil || !exists {
		return false, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.right) < maxRight {
		u.right[sum] = true
	}
	return true, nil
}
