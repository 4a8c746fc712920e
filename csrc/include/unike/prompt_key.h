/* What a prompt's text says of the fact that it asks for: by such keys a memory decides where an edit acts. */
#ifndef UNIKE_PROMPT_KEY_H_
#define UNIKE_PROMPT_KEY_H_

#include "unike/unike.h"

#ifdef __cplusplus
extern "C" {
#endif

#define UNIKE_TOKEN_CHARACTERS 24 /* of a token that count */
#define UNIKE_SPELLING 256        /* numbers that tell a spelling */

/* What a model's tokens spell. The last one is no text; a number that no token has stands for it. */
typedef struct unike_vocabulary {
  int64_t tokens;            /* V, at least 1 */
  const int64_t* characters; /* [V, 1 + UNIKE_TOKEN_CHARACTERS + 1], in lower case, from the second column on */
  const int64_t* marks;      /* [V, 3]: how many characters; 1 where it can go on with the word before it, else 0; 1
                                where the next token can go on with it */
} unike_vocabulary;

/* Queries that attend to the tokens of a prompt, n blocks of H of them. All arrays are contiguous. */
typedef struct unike_prompt_encoder {
  int64_t e, blocks, hidden, heads, width; /* e; n; h; H; c, of what a query sees */
  const float* mean;                       /* [e], of the embeddings */
  const float* inverse_spread;             /* [e] */
  const float* token;                      /* [n h, e] */
  const float* word;                       /* [n h, 256] */
  const float* bias;                       /* [n h] */
  const float* conv;                       /* [n h, 3, h]: of the token before, of itself, of the next one */
  const float* conv_bias;                  /* [n h] */
  const float* query;                      /* [n H, h] */
  const float* token_value;                /* [n H c, e] */
  const float* word_value;                 /* [n H c, 256] */
} unike_prompt_encoder;

/* For each prompt what the queries of each block see, scaled to norm 1; zeros for a prompt without tokens.
 *
 * With x an embedding that is brought to mean 0, spread 1 and norm sqrt(e), and s the spelling of the token's word (the
 * sum of random signs for each run of 1 to 4 of its characters, ends marked, scaled to norm 16): a = token x + word s +
 * bias; b = gelu(a + gelu(conv a' + conv_bias)), a' those of three neighbours; weights = softmax over the tokens of
 * query b (a bias of the query would change nothing); seen = token_value (sum of weights x) + word_value (sum of weights s).
 *
 * ids: [m, tokens]; embeddings: [m tokens, e]; within: [m, tokens], 0 for what is no part of the prompt.
 * keys: [m, n H c], contiguous. A prompt's key depends on it alone, and not on `threads`. */
UNIKE_API unike_status unike_prompt_keys(const unike_prompt_encoder* encoder, const unike_vocabulary* vocabulary,
                                         int64_t m, int64_t tokens, const int64_t* ids, unike_rows embeddings,
                                         const uint8_t* within, float* keys, void* workspace, int64_t workspace_bytes,
                                         int threads);
UNIKE_API int64_t unike_prompt_keys_workspace(const unike_prompt_encoder* encoder, int64_t tokens, int threads);

#ifdef __cplusplus
}
#endif

#endif /* UNIKE_PROMPT_KEY_H_ */
