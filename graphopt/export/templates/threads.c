/* ---- An instance: one block of memory. ---- */

/* What kernels ask for while they run comes from here, and goes back before they return. */
typedef struct {
    unsigned char *bytes;
    size_t used, pieces;
} workspace;

#if !defined(@NAME@_SINGLE_THREAD)
typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    _Atomic uint64_t ticket; /* round << 32 | tasks that nobody has taken */
    _Atomic uint32_t unfinished, sleepers, failures;
    atomic_bool active;  /* a run is under way, so that the next task is near: nobody sleeps */
    atomic_bool stopped;
    task_function *function; /* these three are read by who has taken a task */
    void *data;
    int task_count;
} thread_pool;

typedef struct {
    struct @name@_model *model;
    pthread_t thread;
    workspace *space;
} worker;
#endif

struct @name@_model {
    atomic_flag running;
    int threads;
    bool owns_weights;
    unsigned char *bases[BASE_COUNT];
    dl_tensor tensors[TENSOR_COUNT];
    ffi_value arguments[ARGUMENT_COUNT + 1];
    workspace *spaces; /* one a thread; the first is the caller's */
#if !defined(@NAME@_SINGLE_THREAD)
    thread_pool pool;
    worker *workers; /* the threads but the caller's */
#endif
};

#if defined(@NAME@_SINGLE_THREAD)
#define THREAD_SIZE ROUNDED(WORKSPACE_SIZE + sizeof(workspace))
#else
#define THREAD_SIZE ROUNDED(WORKSPACE_SIZE + sizeof(workspace) + sizeof(worker))
#endif
#define MODEL_SIZE (ROUNDED(sizeof(struct @name@_model)) + ARENA_SIZE) /* and THREAD_SIZE for each thread */

/* ---- Workspaces and threads, which belong to the thread that a kernel runs on. ---- */

#if defined(@NAME@_SINGLE_THREAD)
#define THREAD_LOCAL
#else
#define THREAD_LOCAL _Thread_local
#endif

static THREAD_LOCAL workspace *own_space;

static void *allocate(int device, int device_id, uint64_t size, int type_code, int type_bits) {
    (void)device, (void)device_id, (void)type_code, (void)type_bits;
    workspace *space = own_space;
    if (space == NULL || size > WORKSPACE_SIZE - space->used) {
        return NULL;
    }
    unsigned char *piece = space->bytes + space->used;
    space->used += ROUNDED((size_t)size);
    space->pieces++;
    return piece;
}

/* The workspace holds all pieces of a kernel together, so that it is enough to begin again once all are free. */
static int release(int device, int device_id, void *pointer) {
    (void)device, (void)device_id, (void)pointer;
    if (--own_space->pieces == 0) {
        own_space->used = 0;
    }
    return 0;
}

/* All tasks on this thread. A task count of 0 leaves it to us how many there are: results do not depend on it. */
static int run_here(task_function *function, void *data, int task_count) {
    parallel_environment environment = {NULL, task_count > 0 ? task_count : 1};
    for (int task = 0; task < environment.task_count; task++) {
        int code = function(task, &environment, data);
        if (code != 0) {
            return code;
        }
    }
    return 0;
}

#if defined(@NAME@_SINGLE_THREAD)

static int launch(task_function *function, void *data, int task_count) {
    return run_here(function, data, task_count);
}

static void enter(@name@_model *model) {
    own_space = &model->spaces[0];
}

static void leave(void) {
    own_space = NULL;
}

#else

/* How often to look before a thread gives its core away: some 50 us after a run, 2.5 ms within one. A thread that yields or
 * sleeps early looks idle to the system, which then leaves it on the core of its caller (ResNet-18 on two: 10.7 ms for 5.8). */
enum { SPINS = 4000, SPINS_WITHIN = 200000 };

static THREAD_LOCAL @name@_model *own_model; /* whose threads help the caller; NULL for these threads themselves */

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Take a task of the current round, if one is left, and run it. */
static bool run_task(thread_pool *pool) {
    uint64_t ticket = atomic_load(&pool->ticket);
    do {
        if ((uint32_t)ticket == 0) {
            return false;
        }
    } while (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket - 1));
    parallel_environment environment = {NULL, pool->task_count};
    if (pool->function((int)(uint32_t)ticket - 1, &environment, pool->data) != 0) {
        atomic_fetch_add(&pool->failures, 1);
    }
    atomic_fetch_sub(&pool->unfinished, 1);
    return true;
}

/* Wait for a ticket other than this one. Asleep between runs only: a thread that is woken for a single kernel begins on the
 * core of its waker, and would have slept again before the system moved it to an idle one. */
static void await_round(thread_pool *pool, uint64_t ticket) {
    for (int spin = 0; atomic_load(&pool->ticket) == ticket && !atomic_load(&pool->stopped); spin++) {
        bool active = atomic_load(&pool->active);
        if (spin < (active ? SPINS_WITHIN : SPINS)) {
            relax();
        } else if (active) {
            sched_yield();
        } else {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->sleepers, 1);
            while (!atomic_load(&pool->active) && !atomic_load(&pool->stopped)) {
                pthread_cond_wait(&pool->wake, &pool->mutex);
            }
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

static void *work(void *argument) {
    worker *self = argument;
    thread_pool *pool = &self->model->pool;
    own_space = self->space;
    while (!atomic_load(&pool->stopped)) {
        uint64_t ticket = atomic_load(&pool->ticket);
        if (!run_task(pool) && (uint32_t)ticket == 0) {
            await_round(pool, ticket);
        }
    }
    return NULL;
}

static void wake_all(thread_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

static int launch(task_function *function, void *data, int task_count) {
    @name@_model *model = own_model;
    if (model == NULL || model->threads == 1) {
        return run_here(function, data, task_count);
    }
    if (task_count <= 0) {
        task_count = model->threads;
    }
    thread_pool *pool = &model->pool;
    pool->function = function;
    pool->data = data;
    pool->task_count = task_count;
    atomic_store(&pool->failures, 0);
    atomic_store(&pool->unfinished, (uint32_t)task_count);
    uint64_t round = (atomic_load(&pool->ticket) >> 32) + 1;
    atomic_store(&pool->ticket, round << 32 | (uint32_t)task_count);
    while (run_task(pool)) {
    }
    for (int spin = 0; atomic_load(&pool->unfinished) > 0; spin++) {
        if (spin < SPINS_WITHIN) {
            relax();
        } else {
            sched_yield();
        }
    }
    return atomic_load(&pool->failures) == 0 ? 0 : -1;
}

static void enter(@name@_model *model) {
    own_space = &model->spaces[0];
    own_model = model;
    atomic_store(&model->pool.active, true);
    if (atomic_load(&model->pool.sleepers) > 0) {
        wake_all(&model->pool);
    }
}

static void leave(void) {
    atomic_store(&own_model->pool.active, false);
    own_space = NULL;
    own_model = NULL;
}

/* Stop the first `count` workers. */
static void stop_threads(@name@_model *model, int count) {
    thread_pool *pool = &model->pool;
    atomic_store(&pool->stopped, true);
    wake_all(pool);
    for (int i = 0; i < count; i++) {
        pthread_join(model->workers[i].thread, NULL);
    }
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
}

static @name@_status start_threads(@name@_model *model) {
    thread_pool *pool = &model->pool;
    if (pthread_mutex_init(&pool->mutex, NULL) != 0) {
        return @NAME@_NO_THREAD;
    }
    if (pthread_cond_init(&pool->wake, NULL) != 0) {
        pthread_mutex_destroy(&pool->mutex);
        return @NAME@_NO_THREAD;
    }
    for (int i = 0; i < model->threads - 1; i++) {
        worker *each = &model->workers[i];
        each->model = model;
        each->space = &model->spaces[i + 1];
        if (pthread_create(&each->thread, NULL, work, each) != 0) {
            stop_threads(model, i);
            return @NAME@_NO_THREAD;
        }
    }
    return @NAME@_OK;
}

#endif
