package remotes

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// challenge is one of the ways in which a server wants a request to be authenticated (RFC 9110, section 11.6.1).
type challenge struct {
	scheme string
	params map[string]string // by names in lower case; of one that comes twice, the first
}

// parseChallenges reads one field of WWW-Authenticate, which may hold several challenges. What does not follow the
// grammar is skipped up to the next comma.
func parseChallenges(field string) (list []challenge) {
	bare := false // the last challenge has no parameter yet, and no comma behind it
	for {
		rest := strings.TrimLeft(field, " \t,")
		if strings.Contains(field[:len(field)-len(rest)], ",") {
			bare = false
		}
		word := token(rest)
		if rest == "" {
			return list
		}
		if word == "" {
			field = afterComma(rest)
			bare = false
			continue
		}
		rest = strings.TrimLeft(rest[len(word):], " \t")
		value, isParam := strings.CutPrefix(rest, "=")
		value = strings.TrimLeft(value, " \t")
		switch {
		case isParam && value != "" && value[0] != ',' && value[0] != '=':
			text, after := parameter(value)
			if n := len(list) - 1; n >= 0 {
				if name := strings.ToLower(word); list[n].params == nil {
					list[n].params = map[string]string{name: text}
				} else if _, twice := list[n].params[name]; !twice {
					list[n].params[name] = text
				}
			}
			field = after
		case isParam || bare: // the scheme's token68, such as Negotiate has
			field = afterComma(rest)
		default:
			list = append(list, challenge{scheme: word})
			field, bare = rest, true
			continue
		}
		bare = false
	}
}

// token returns the token that s begins with (RFC 9110, section 5.6.2), "" if there is none.
func token(s string) string {
	end := strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	})
	if end < 0 {
		return s
	}
	return s[:end]
}

// parameter returns the value of a parameter, which s begins with, and what follows. A value without quotes may hold
// what should be quoted, as registries write addresses.
func parameter(s string) (value, after string) {
	if s[0] != '"' {
		if end := strings.IndexAny(s, ", \t"); end >= 0 {
			return s[:end], s[end:]
		}
		return s, ""
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), s[i+1:]
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), "" // the closing quote is missing
}

func afterComma(s string) string {
	_, after, _ := strings.Cut(s, ",")
	return after
}

// chooseChallenge leaves one challenge in the header, in the form that oras reads: Bearer with a realm, else Basic,
// whatever their order and however many fields hold them. Of a header with neither it returns the schemes.
func chooseChallenge(h http.Header) (refused []string) {
	const name = "Www-Authenticate"
	var all []challenge
	for _, field := range h[name] {
		all = append(all, parseChallenges(field)...)
	}
	isBearer := func(c challenge) bool { return strings.EqualFold(c.scheme, "bearer") && c.params["realm"] != "" }
	isBasic := func(c challenge) bool { return strings.EqualFold(c.scheme, "basic") }
	for _, is := range []func(challenge) bool{isBearer, isBasic} {
		if i := slices.IndexFunc(all, is); i >= 0 {
			h[name] = []string{all[i].String()}
			return nil
		}
	}
	for _, c := range all {
		if !slices.Contains(refused, c.scheme) && len(refused) < 5 {
			refused = append(refused, c.scheme)
		}
	}
	delete(h, name)
	return refused
}

// String writes the challenge with the parameters that matter to a client.
func (c challenge) String() string {
	s := c.scheme
	for i, name := range []string{"realm", "service", "scope"} {
		if value, ok := c.params[name]; ok {
			if i > 0 {
				s += ","
			}
			s += " " + name + "=" + strconv.Quote(value)
		}
	}
	return s
}
